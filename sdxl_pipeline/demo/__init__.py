"""Generator of the demo dataset: coloured shapes with captions."""
