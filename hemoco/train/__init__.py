"""The pretraining loop with its state, optimiser and checkpoints."""
