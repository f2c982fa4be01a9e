"""Caches of latents and text embeddings: the tensor store, what fills it, and what prunes it."""
