"""Backbones: the file a pretraining leaves, starting weights, export and import."""
