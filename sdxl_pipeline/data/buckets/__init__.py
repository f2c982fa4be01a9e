"""Aspect buckets, crop plan and held-out split."""
