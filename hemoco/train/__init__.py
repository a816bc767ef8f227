"""Training: the pretraining loop, its state, optimisers and checkpoints."""
