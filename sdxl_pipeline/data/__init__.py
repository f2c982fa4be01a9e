"""Datasets: sources, scan, captions, buckets and crops, masks, duplicates."""
