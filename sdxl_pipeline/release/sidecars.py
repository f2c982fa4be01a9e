"""What A1111, Forge and InvokeAI show of released weights: the files beside them with preview, description and trigger words."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import atomic_path, write_text_atomic
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.adapter_labels import adapter_name
from sdxl_pipeline.release.sanitize import portable_name
from sdxl_pipeline.runtime.specs import KIND_LABELS, TrainedLora, ValidationPrompt


def write_sidecars(
    weights: Path,
    project: str,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    lora: TrainedLora,
    trigger_words: Sequence[str],
    prompts: Sequence[ValidationPrompt],
    preview: Path | None,
) -> None:
    """Write `<name>.json` and, where there is a preview image, `<name>.png` beside the weights file `<name>.safetensors`."""
    negative = next((prompt.negative_prompt for prompt in prompts if prompt.negative_prompt), "")
    entries: dict[str, Any] = {
        "description": description(project, base_model, settings, lora),
        "notes": settings.model_card_note or "",
        "sd version": "SDXL",
        "activation text": ", ".join(trigger_words),
        "preferred weight": 1.0,
        "negative text": negative,
    }
    if lora.weights_kind == "unet":
        del entries["preferred weight"]  # of a checkpoint there is none
    write_text_atomic(weights.with_suffix(".json"), json.dumps(entries, indent=2, ensure_ascii=False) + "\n")
    if preview is not None:
        with Image.open(preview) as image, atomic_path(weights.with_suffix(".png")) as temporary:
            image.save(temporary, format="PNG")


def description(
    project: str, base_model: ResolvedModel, settings: TrainingSettings, lora: TrainedLora
) -> str:
    """Return what the weights are, in a sentence without markup."""
    what = adapter_name(settings) if lora.weights_kind == "lora" else f"a {KIND_LABELS['unet']}"
    return f"{project}: {what} for {portable_name(base_model.source)}, {lora.steps:,} steps."
