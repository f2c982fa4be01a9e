"""Fine-tuning Stable Diffusion XL as a graph of data assets."""
