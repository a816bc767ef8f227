"""Sweeps: pretrainings with settings drawn from a space, of which bad ones are stopped early."""
