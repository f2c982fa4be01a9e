"""The tiny autoencoder that decodes previews in a fraction of the VAE's time and memory (TAESD, Boer Bohan 2023).

Its decoder takes scaled latents, as the UNet uses them. It is distilled from one VAE and gives other colours for another, so it belongs to
a base model like its VAE.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.validation import ValidationSettings
from sdxl_pipeline.models.base_model import BUNDLED_NAME, BUNDLED_TAESD, ResolvedModel
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.models.model_files import BaseModelError

BUNDLED_TAESD_NAME: Final = "bundled:tiny-taesd"
SDXL_TAESD_ID: Final = "madebyollin/taesdxl"
CONFIG: Final = "config.json"
WEIGHTS: Final = "diffusion_pytorch_model.safetensors"


def tiny_autoencoder_folder(settings: ValidationSettings, base_model: ResolvedModel) -> Path:
    """Return the folder of the tiny autoencoder for previews, downloaded if needed; safetensors only. Does not import torch.

    The default is SDXL's, or the bundled one for the bundled model. Raises BaseModelError when it is not available.
    """
    source = settings.validation_preview_model_name_or_path
    if source is None:
        source = BUNDLED_TAESD_NAME if base_model.source == BUNDLED_NAME else SDXL_TAESD_ID
    if source == BUNDLED_TAESD_NAME:
        return BUNDLED_TAESD
    folder = Path(source).expanduser()
    if folder.is_dir():
        choose_files([path.name for path in folder.iterdir()], source)
        return folder
    if folder.is_absolute() or source.count("/") != 1 or source.startswith("bundled:"):
        raise BaseModelError(
            f"validation_preview_model_name_or_path is {source!r}, which is not a folder. Set it to the folder of a tiny autoencoder in "
            f"diffusers' layout, a Hub id such as {SDXL_TAESD_ID!r}, or {BUNDLED_TAESD_NAME!r}."
        )
    try:
        return download_snapshot(source, None, [CONFIG], lambda names: choose_files(names, source)).folder
    except BaseModelError as error:
        raise BaseModelError(
            f"validation_preview needs the tiny autoencoder {source}, which is not available: {error} Or set "
            "validation_preview_model_name_or_path to a folder that contains it, or validation_preview to false."
        ) from error


def choose_files(names: Collection[str], source: str) -> list[str]:
    """Return the files of a tiny autoencoder that are read. Raises BaseModelError if one is missing."""
    if missing := [name for name in (CONFIG, WEIGHTS) if name not in names]:
        raise BaseModelError(
            f"{source} has no {' and no '.join(missing)}, so it cannot be loaded as a tiny autoencoder: its weights are read from "
            "safetensors only."
        )
    return [CONFIG, WEIGHTS]
