"""Image formats, decoding and pixels."""
