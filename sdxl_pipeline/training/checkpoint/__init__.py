"""Checkpoints, resume, warm start and the identity of a run."""
