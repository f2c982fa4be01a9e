"""Asset checks: of the datasets, and of the caches, the LoRA and its evaluation."""
