"""Transfers fanned out from one driver: units, jobs, training, curves."""
