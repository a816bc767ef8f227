"""The contents of a shard folder: its index, tables of samples, tar files."""
