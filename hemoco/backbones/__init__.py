"""Backbones: their file format, the starting weights of transfers, export and import."""
