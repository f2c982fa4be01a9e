"""What a trained LoRA is worth: eval loss, CLIP score, gallery, report."""
