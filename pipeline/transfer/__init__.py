"""Transfers of a run, measured in parallel from one driver."""
