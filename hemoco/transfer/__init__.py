"""Transfers: what a backbone is worth on labelled data, frozen (kNN, linear probe, low-shot) or fine-tuned."""
