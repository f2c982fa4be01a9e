"""Whether one model's eval loss differs from another's: paired over images, which are measured at the same timesteps and noise."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from sdxl_pipeline.runtime.specs import LossSummary, PairedDifference


def paired_difference(after: LossSummary, before: Mapping[str, float]) -> PairedDifference:
    """Return the mean of (after - before) over the images that both have, with its standard error."""
    differences = [loss - before[image] for image, loss in after.by_image if image in before]
    if not differences:
        return PairedDifference(images=0, mean=0.0, standard_error=None)
    count = len(differences)
    mean = sum(differences) / count
    squares = sum((difference - mean) ** 2 for difference in differences)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else None
    return PairedDifference(images=count, mean=mean, standard_error=error)


def released_losses(report: Path) -> dict[str, float]:
    """Return the losses by image that a released report.json holds of its LoRA; none when it was written by an earlier version."""
    loss = json.loads(report.read_text(encoding="utf-8")).get("lora_loss") or {}
    return dict(loss.get("by_image", ()))
