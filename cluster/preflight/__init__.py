"""Checks of services, a cluster and its nodes before a run."""
