"""LoRA, DoRA and LyCORIS adapters of a model."""
