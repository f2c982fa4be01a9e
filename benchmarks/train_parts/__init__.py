"""One module per part of `benchmarks.train`, and the loops they hold against each other."""
