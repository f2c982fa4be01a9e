"""Image files: scanning, captions, buckets and crops, pixels."""
