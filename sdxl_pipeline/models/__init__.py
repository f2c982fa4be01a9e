"""SDXL base models: loading, precision, encoding, sampling."""
