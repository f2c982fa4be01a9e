"""Generator of the demo dataset of coloured shapes with captions."""
