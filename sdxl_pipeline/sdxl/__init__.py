"""The SDXL base model: where it lies, its components, its conditioning, its adapters."""
