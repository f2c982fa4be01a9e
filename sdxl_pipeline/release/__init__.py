"""A trained LoRA made publishable: export, model card, Hub upload."""
