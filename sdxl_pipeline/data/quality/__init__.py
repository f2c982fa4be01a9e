"""Perceptual hashes, near duplicates and contact sheets."""
