"""Validation images and eval loss."""
