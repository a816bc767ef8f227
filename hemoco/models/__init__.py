"""MoCo v1, v2 and v3: encoders, heads, losses."""
