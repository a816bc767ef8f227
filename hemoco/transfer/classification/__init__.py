"""Transfers that classify: kNN, linear probe, low-shot, fine-tuning."""
