"""Features of a frozen backbone: extraction, cache, Parquet files, neighbours, map."""
