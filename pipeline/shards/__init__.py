"""Packing, indexing and verifying of shards as Ray tasks."""
