"""Bytes by URL: objects, byte ranges, retries and a cache on disk."""
