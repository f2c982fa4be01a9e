"""Optimizers, learning-rate schedules and averaged weights."""
