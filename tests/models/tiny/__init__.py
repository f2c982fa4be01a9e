"""Tests of the bundled tiny SDXL."""
