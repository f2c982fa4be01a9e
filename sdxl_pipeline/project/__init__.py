"""config.json and multidatabackend.json read into validated settings."""
