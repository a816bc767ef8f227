"""Pretrainings with settings drawn from a space, bad ones stopped early."""
