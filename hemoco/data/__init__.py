"""Shards, their order, the stream of batches and the views made of them."""
