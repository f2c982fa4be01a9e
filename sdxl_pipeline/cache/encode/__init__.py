"""Encoding of images and captions into the tensor store."""
