"""Masks and their images."""
