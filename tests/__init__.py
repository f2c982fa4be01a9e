"""The tests mirror the tree of the packages they hold to account."""
