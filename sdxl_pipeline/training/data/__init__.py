"""Samples, batch sampling, batches and loss masks."""
