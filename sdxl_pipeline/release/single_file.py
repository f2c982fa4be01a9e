"""The single-file checkpoint of a trained UNet in SDXL's original layout and float16, as ComfyUI, A1111, Forge and kohya load it.

The UNet is streamed from its folder to the file. Only the base model's VAE and text encoders, about 2 GB, are held in memory, which is
less than one copy of the UNet.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.disk_space import require_space
from sdxl_pipeline.files.stable_safetensors import write_streamed_safetensors
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_noise_scheduler, load_text_encoders, load_vae
from sdxl_pipeline.models.original_layout import (
    first_text_tensors,
    second_text_tensors,
    unet_tensors,
    vae_tensors,
)
from sdxl_pipeline.release.card_metadata import base_licence
from sdxl_pipeline.release.formats.kohya_header import thumbnail_uri
from sdxl_pipeline.release.release_inputs import ExportError, ReleaseInputs
from sdxl_pipeline.release.unet_folder import open_tensors, tensor_shapes

DTYPE = torch.float16
MARKERS = frozenset({"v_pred", "ztsnr"})
"""Empty tensors by which ComfyUI and Forge recognize v-prediction and a zero-terminal-SNR schedule."""


def write_checkpoint(
    path: Path,
    unet_folder: Path,
    base_model: ResolvedModel,
    settings: TrainingSettings,
    metadata: Mapping[str, str],
) -> None:
    """Write the trained UNet with the base model's other components to `path`.

    Raises ExportError for a weight that overflows float16, and DiskFullError when there is not enough disk space.
    """
    encoders = load_text_encoders(base_model, DTYPE)
    other_components = dict(prediction_markers(base_model, settings))
    other_components |= first_text_tensors(encoders.text_encoder.state_dict())
    other_components |= second_text_tensors(encoders.text_encoder_2.state_dict())
    # in float32: the loader refuses a float16 VAE whose activations overflow, although its weights do not
    other_components |= vae_tensors(load_vae(base_model, torch.float32).state_dict())
    shapes = {
        name: torch.empty(shape, dtype=DTYPE, device="meta")
        for name, shape in tensor_shapes(unet_folder).items()
    }
    config = UNet2DConditionModel.load_config(unet_folder)
    layout = {name: _to_half(tensor.to("meta")) for name, tensor in other_components.items()}
    layout |= unet_tensors(shapes, config)
    require_space(path.parent, sum(tensor.nbytes for tensor in layout.values()), "the single-file checkpoint")
    with open_tensors(unet_folder) as unet:

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for source in (other_components.items(), unet_tensors(unet, config)):
                for name, tensor in source:
                    yield name, _require_finite(name, _to_half(tensor))

        write_streamed_safetensors(path, layout, tensors(), metadata)


def require_loadable(path: Path, unet_folder: Path, base_model: ResolvedModel) -> None:
    """Raise ExportError unless every program loads the checkpoint of a trained UNet completely.

    Names and shapes must be those of the base model's architecture, created here without weights, and the UNet must be the trained one in
    float16. Reads the UNet one tensor at a time.
    """
    expected = architecture_shapes(base_model)
    with safe_open(path, framework="pt") as file, open_tensors(unet_folder) as unet:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        stored = {name: shape for name, shape in stored.items() if name not in MARKERS}
        if mismatched := sorted(
            name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name)
        ):
            name = mismatched[0]
            raise ExportError(
                f"{path.name}: {len(mismatched)} missing, unexpected or misshapen tensors, such as {name}: "
                f"{stored.get(name, 'absent')} instead of {expected.get(name, 'absent')}"
            )
        config = UNet2DConditionModel.load_config(unet_folder)
        for name, tensor in unet_tensors(unet, config):
            if not torch.equal(file.get_tensor(name), _to_half(tensor)):
                raise ExportError(f"{path.name}: {name} is not the trained weight")


def architecture_shapes(base_model: ResolvedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a base model's tensors by their names in SDXL's original layout."""
    folder = Path(base_model.config_path)
    with torch.device("meta"):
        config = UNet2DConditionModel.load_config(folder, subfolder="unet")
        unet = UNet2DConditionModel.from_config(config)
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / "text_encoder_2"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
    layout = (
        *unet_tensors(unet.state_dict(), config),
        *first_text_tensors(first.state_dict()),
        *second_text_tensors(second.state_dict()),
        *vae_tensors(vae.state_dict()),
    )
    return {name: tuple(tensor.shape) for name, tensor in layout}


def checkpoint_metadata(inputs: ReleaseInputs, preview: Path | None) -> dict[str, str]:
    """Return the checkpoint's header entries of modelspec 1.0.1, except the hash. The same training gives the same entries."""
    prediction = _scheduler_config(inputs.base_model, inputs.settings).prediction_type
    height, width = inputs.settings.validation_sizes[0]
    entries = {
        "identity": inputs.lora.identity,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": inputs.project,
        "modelspec.description": inputs.description,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.license": base_licence(inputs).get("license"),
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(prediction),
        "modelspec.trigger_phrase": inputs.trigger_words[0] if inputs.trigger_words else None,
        "modelspec.thumbnail": preview and thumbnail_uri(preview),
        "modelspec.unet_dtype": str(DTYPE),
    }
    return {name: value for name, value in entries.items() if value}


def prediction_markers(base_model: ResolvedModel, settings: TrainingSettings) -> Iterator[tuple[str, Tensor]]:
    """Yield the MARKERS that apply to the trained model."""
    config = _scheduler_config(base_model, settings)
    if config.prediction_type == "v_prediction":
        yield "v_pred", torch.zeros(0, dtype=torch.int64)
        if config.rescale_betas_zero_snr:
            yield "ztsnr", torch.zeros(0, dtype=torch.int64)


def _scheduler_config(base_model: ResolvedModel, settings: TrainingSettings) -> Any:
    return load_noise_scheduler(base_model, settings.scheduler_changes).config


def _to_half(tensor: Tensor) -> Tensor:
    return tensor.to(DTYPE) if tensor.is_floating_point() else tensor


def _require_finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise ExportError(
            f"{name} holds values that are not finite in float16 (its maximum is {torch.finfo(DTYPE).max:g}), so no single-file checkpoint "
            "of this model can be written. The training diverged: train with a lower learning_rate"
        )
    return tensor
