"""One module per part of `benchmarks.data`."""
