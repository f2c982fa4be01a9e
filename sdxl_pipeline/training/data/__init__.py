"""Samples, their order, batches and loss masks."""
