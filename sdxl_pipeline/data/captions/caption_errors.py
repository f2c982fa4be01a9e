"""What keeps the captions of a whole dataset from being read."""


class CaptionError(Exception):
    """A caption table or filter list that cannot be used. The message names the dataset, the key, the value and the remedy."""
