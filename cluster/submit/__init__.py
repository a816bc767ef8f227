"""Submits a command to a cluster as a Ray job."""
