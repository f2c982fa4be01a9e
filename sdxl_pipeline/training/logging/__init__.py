"""Metrics, plots, trackers and observers of a run."""
