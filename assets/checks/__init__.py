"""Asset checks of datasets and crop plans, and of caches, LoRA and evaluation."""
