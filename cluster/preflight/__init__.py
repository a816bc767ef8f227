"""Checks of a cluster and its nodes before a run."""
