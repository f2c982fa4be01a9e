"""The CLIP model that scores images: its choice by the settings, its files and its name. Imports no torch."""

from collections.abc import Collection
from pathlib import Path

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_CLIP, BUNDLED_NAME, ResolvedModel
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.runtime.stage_runner import UserError

BUNDLED_CLIP_NAME = "bundled:tiny-clip"
CONFIG = "config.json"
PROCESSOR_CONFIG = "preprocessor_config.json"

_DEFAULT = TrainingSettings.model_fields["pretrained_evaluation_model_name_or_path"].default
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
)


def scoring_model_folder(settings: TrainingSettings, base_model: ResolvedModel) -> Path:
    """Return the folder of the CLIP model in pretrained_evaluation_model_name_or_path, downloaded if necessary; safetensors only.

    The bundled base model generates images that only the bundled CLIP was trained on, and runs offline: with it, the default setting
    selects the bundled CLIP. Raises UserError for a setting that is not a CLIP model, and BaseModelError when the download fails.
    """
    if _is_bundled(settings, base_model):
        return BUNDLED_CLIP
    source = settings.pretrained_evaluation_model_name_or_path
    folder = Path(source).expanduser()
    if folder.is_dir():
        choose_files([path.name for path in folder.iterdir()], source)
        return folder
    if folder.is_absolute() or source.count("/") != 1 or source.startswith("bundled:"):
        raise UserError(
            f"pretrained_evaluation_model_name_or_path is {source!r}, which is not an existing folder. Set it to the folder of a CLIP model, "
            f"a Hub id of the form owner/name, or {BUNDLED_CLIP_NAME!r}"
        )
    return download_snapshot(source, None, [CONFIG], lambda names: choose_files(names, source)).folder


def choose_files(names: Collection[str], source: str) -> list[str]:
    """Return those of a CLIP model's files that scoring reads. Raises UserError if one is missing or there are no safetensors weights."""
    for required in (CONFIG, PROCESSOR_CONFIG):
        if required not in names:
            raise UserError(f"{source} has no {required}, so it is not a CLIP model that can score images")
    weights = sorted(
        name
        for name in names
        if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))
    )
    if not weights:
        raise UserError(
            f"{source} has no .safetensors weights. Other formats are not loaded, since pickled files can run code when they are opened. "
            'Set "pretrained_evaluation_model_name_or_path" to a CLIP model that has them, such as "openai/clip-vit-large-patch14", or '
            "to a folder with a converted copy"
        )
    return [CONFIG, PROCESSOR_CONFIG, *weights, *(name for name in _TOKENIZER_FILES if name in names)]


def scoring_model_name(settings: TrainingSettings, base_model: ResolvedModel) -> str:
    """Return the CLIP model's name for reports: the name in the settings; of a local path only the last part."""
    if _is_bundled(settings, base_model):
        return BUNDLED_CLIP_NAME
    source = settings.pretrained_evaluation_model_name_or_path
    return Path(source).expanduser().name if Path(source).expanduser().is_dir() else source


def _is_bundled(settings: TrainingSettings, base_model: ResolvedModel) -> bool:
    source = settings.pretrained_evaluation_model_name_or_path
    return source == BUNDLED_CLIP_NAME or (source == _DEFAULT and base_model.source == BUNDLED_NAME)
