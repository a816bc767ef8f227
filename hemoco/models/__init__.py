"""Encoders, heads, methods (MoCo v1, v2, v3) and losses, close to the notation of the papers."""
