"""Image formats, decoding, colour conversion and pixels of crops."""
