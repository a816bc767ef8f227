"""Classification transfers: kNN, linear probe, low-shot, linear classification, fine-tuning."""
