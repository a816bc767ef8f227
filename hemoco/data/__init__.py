"""Shards, the order and stream of their samples, and the views made of the images."""
