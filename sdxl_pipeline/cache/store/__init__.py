"""Tensor store: safetensors shards with a Parquet index."""
