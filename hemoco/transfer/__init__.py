"""Transfers: the quality of a backbone on labelled data, frozen or fine-tuned.

Frozen features are measured by kNN, a linear probe and low-shot classification.
"""
