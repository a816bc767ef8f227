"""Exact elastic batches from shards in object storage."""
