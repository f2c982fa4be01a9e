"""Evaluation of a trained model against its base model: eval loss, CLIP score, gallery, report."""
