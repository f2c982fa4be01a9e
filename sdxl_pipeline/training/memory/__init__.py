"""Estimate of device memory."""
