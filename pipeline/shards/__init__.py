"""Packing, indexing and verifying shards as Ray tasks."""
