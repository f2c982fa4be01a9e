"""The models that score images, CLIP and optionally a similarity model such as DINOv2: their choice by the settings, files and names.

Imports no torch, so that a missing model fails before the training.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_CLIP, BUNDLED_NAME, ResolvedModel
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.runtime.stage_runner import UserError

BUNDLED_CLIP_NAME = "bundled:tiny-clip"
CONFIG = "config.json"
PROCESSOR_CONFIG = "preprocessor_config.json"
CLIP_KEY = "pretrained_evaluation_model_name_or_path"
SIMILARITY_KEY = "pretrained_similarity_model_name_or_path"

CLIP_TYPE = "clip"
SIMILARITY_TYPES: Final = (CLIP_TYPE, "dinov2", "dinov2_with_registers", "dinov3_vit", "vit")
"""Architectures, as `model_type` in config.json, whose image embedding is known: CLIP's projection, else the CLS token."""

_EXAMPLES: Final = {CLIP_KEY: "openai/clip-vit-large-patch14", SIMILARITY_KEY: "facebook/dinov2-small"}
_LABELS: Final = {CLIP_KEY: "a CLIP model", SIMILARITY_KEY: "a DINOv2 or CLIP model"}
_DEFAULT = TrainingSettings.model_fields[CLIP_KEY].default
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class ScoringModelFolders:
    """Local folders of the scoring models; `similarity` is that of CLIP where no similarity model is configured."""

    clip: Path
    similarity: Path


def require_scoring_models(
    settings: TrainingSettings, base_model: ResolvedModel
) -> ScoringModelFolders | None:
    """Return the folders of the scoring models, downloaded if necessary; None with evaluation_type none.

    Raises the errors of `scoring_model_folder`.
    """
    if settings.evaluation_type == "none":
        return None
    clip = scoring_model_folder(settings, base_model)
    source = settings.pretrained_similarity_model_name_or_path
    if source is None or not settings.num_caption_samples:
        return ScoringModelFolders(clip, clip)
    similarity = BUNDLED_CLIP if source == BUNDLED_CLIP_NAME else _model_folder(source, SIMILARITY_KEY)
    return ScoringModelFolders(clip, similarity)


def scoring_model_folder(settings: TrainingSettings, base_model: ResolvedModel) -> Path:
    """Return the folder of the CLIP model in pretrained_evaluation_model_name_or_path, downloaded if necessary; safetensors only.

    The bundled base model generates images that only the bundled CLIP was trained on, and runs offline: with it, the default setting
    selects the bundled CLIP. Raises UserError for a setting that is not a CLIP model, and BaseModelError when the download fails.
    """
    if _is_bundled(settings, base_model):
        return BUNDLED_CLIP
    return _model_folder(settings.pretrained_evaluation_model_name_or_path, CLIP_KEY)


def _model_folder(source: str, key: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        choose_files([path.name for path in folder.iterdir()], source, key)
    else:
        if folder.is_absolute() or source.count("/") != 1 or source.startswith("bundled:"):
            raise UserError(
                f"{key} is {source!r}, which is not an existing folder. Set it to the folder of {_LABELS[key]}, "
                f"a Hub id of the form owner/name, or {BUNDLED_CLIP_NAME!r}"
            )
        folder = download_snapshot(
            source, None, [CONFIG], lambda names: choose_files(names, source, key)
        ).folder
    _require_architecture(folder, source, key)
    return folder


def choose_files(names: Collection[str], source: str, key: str = CLIP_KEY) -> list[str]:
    """Return those of a scoring model's files that are read. Raises UserError if one is missing or there are no safetensors weights."""
    for required in (CONFIG, PROCESSOR_CONFIG):
        if required not in names:
            raise UserError(f"{key}: {source} has no {required}, so it is not {_LABELS[key]}")
    weights = sorted(
        name
        for name in names
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    )
    if not weights:
        raise UserError(
            f"{key}: {source} has no .safetensors weights. Other formats are not loaded, since pickled files can run code when they are "
            f"opened. Set it to {_LABELS[key]} that has them, such as {_EXAMPLES[key]!r}, or to a folder with a converted copy"
        )
    return [CONFIG, PROCESSOR_CONFIG, *weights, *(name for name in _TOKENIZER_FILES if name in names)]


def _require_architecture(folder: Path, source: str, key: str) -> None:
    try:
        model_type = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{key}: {source} has an invalid {CONFIG}: {error}") from error
    allowed = (CLIP_TYPE,) if key == CLIP_KEY else SIMILARITY_TYPES
    if model_type not in allowed:
        raise UserError(
            f"{key} is {source!r}, whose model_type is {model_type!r}. Set it to {_LABELS[key]}, such as {_EXAMPLES[key]!r} "
            f"(model_type {' or '.join(allowed)})"
        )


def scoring_model_name(settings: TrainingSettings, base_model: ResolvedModel) -> str:
    """Return the CLIP model's name for reports: the name in the settings; of a local path only the last part."""
    if _is_bundled(settings, base_model):
        return BUNDLED_CLIP_NAME
    return _display_name(settings.pretrained_evaluation_model_name_or_path)


def similarity_model_name(settings: TrainingSettings, base_model: ResolvedModel) -> str:
    """Return the name of the model that compares images, for reports."""
    source = settings.pretrained_similarity_model_name_or_path
    return scoring_model_name(settings, base_model) if source is None else _display_name(source)


def _display_name(source: str) -> str:
    folder = Path(source).expanduser()
    return folder.name if folder.is_dir() else source


def _is_bundled(settings: TrainingSettings, base_model: ResolvedModel) -> bool:
    source = settings.pretrained_evaluation_model_name_or_path
    return source == BUNDLED_CLIP_NAME or (source == _DEFAULT and base_model.source == BUNDLED_NAME)
