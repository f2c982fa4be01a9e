"""Masks of images."""
