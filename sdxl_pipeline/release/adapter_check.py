"""The check that an adapter file can be used, against models without weights, which take seconds and almost no memory for SDXL."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.models.adapters.adapter import load_adapter, require_complete
from sdxl_pipeline.models.adapters.adapter_files import (
    PREFIXES,
    UNET,
    AdapterError,
    AdapterFile,
    has_nonzero_update,
    read_header,
)
from sdxl_pipeline.models.adapters.lycoris import count_lycoris_layers
from sdxl_pipeline.models.base_model import ResolvedModel


def count_changed_layers(path: Path, base_model: ResolvedModel) -> int:
    """Return how many layers of the base model an adapter file changes, after loading it with its users' own loader.

    Raises AdapterError with the reason unless every tensor belongs to a layer, all values are finite and some update is not zero.
    """
    try:
        file = read_header(path)
        models = _models_without_weights(file, base_model)
        if file.kind == "lycoris":
            layers = count_lycoris_layers(models[UNET], path)
        else:
            with _without_copies():
                layers = sum(len(names) for names in load_adapter(models, path).values())
            require_complete(models, path)
        tensors = load_file(path)
    except (AdapterError, OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise AdapterError(f"{path} does not load back: {error}") from error
    if broken := sorted(name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()):
        raise AdapterError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, such as {broken[0]}. The training diverged"
        )
    if not has_nonzero_update(tensors):
        raise AdapterError(f"{path} changes nothing: all its updates are zero")
    return layers


def _models_without_weights(file: AdapterFile, base_model: ResolvedModel) -> dict[str, nn.Module]:
    """Return by prefix the UNet and those text encoders for which the file has tensors, on the meta device."""
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(base_model.config_path, subfolder="unet")
        models: dict[str, nn.Module] = {UNET: UNet2DConditionModel.from_config(config)}
        for prefix in PREFIXES[1:]:
            if any(name.startswith(f"{prefix}.") for name in file.names):
                folder = Path(base_model.config_path) / prefix
                models[prefix] = encoders[prefix](CLIPTextConfig.from_pretrained(folder))
    return models


@contextmanager
def _without_copies() -> Iterator[None]:
    # torch warns for every tensor that it does not copy into a meta parameter, which is intended here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter", category=UserWarning)
        yield
