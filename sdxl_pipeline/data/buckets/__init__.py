"""Aspect buckets, crops and the held-out split."""
