"""Batches streamed from shards in object storage: exact, and the same at any number of ranks."""
