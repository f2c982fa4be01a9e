"""What is evaluated: the trained model and its base model, one at a time in the same pipeline.

What was trained is loaded from its exported files by diffusers' own loader, as its users will load it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from peft import get_peft_model_state_dict
from safetensors import safe_open

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import EvaluateSpec
from sdxl_pipeline.sdxl.adapters import adapted_module_names, without_adapter
from sdxl_pipeline.sdxl.components import load_unet
from sdxl_pipeline.sdxl.drawing import drawing_pipeline
from sdxl_pipeline.sdxl.precision import dtype_from_name

ADAPTER = "evaluated"


class Subject(ABC):
    """The trained model in a pipeline without text encoders, and its base model in its place."""

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        self.pipeline = pipeline

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Have the base model in the pipeline while the block runs."""


class AdaptedUNet(Subject):
    """A UNet with an adapter, which can be switched off."""

    @contextmanager
    def base(self) -> Iterator[None]:
        """Switch the adapter off."""
        with without_adapter(self.pipeline.unet):
            yield


class WholeUNet(Subject):
    """A UNet all of whose weights were trained. The base model's waits on the CPU, so that the device holds but one."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, base_unet: UNet2DConditionModel) -> None:
        super().__init__(pipeline)
        self._base_unet = base_unet

    @contextmanager
    def base(self) -> Iterator[None]:
        """Exchange the two UNets, and back."""
        trained = self.pipeline.unet
        device = trained.device
        self.pipeline.unet = _exchanged(trained, self._base_unet, device)
        try:
            yield
        finally:
            self.pipeline.unet = _exchanged(self._base_unet, trained, device)


def load_subject(spec: EvaluateSpec) -> Subject:
    """What the training left, loaded back beside the base model.

    Raises StageError when it does not load back whole.
    """
    dtype = dtype_from_name(spec.settings.mixed_precision or spec.hardware.mixed_precision)
    base = load_unet(spec.base_model, dtype).eval()
    if spec.lora.weights_kind == "unet":
        unet = _load_unet(Path(spec.lora.weights_path), base, dtype)
        return WholeUNet(_pipeline(spec, unet.to(spec.hardware.device)), base)
    pipeline = _pipeline(spec, base.to(spec.hardware.device))
    _load_lora(pipeline, Path(spec.lora.weights_path), spec.lora.adapted_modules)
    return AdaptedUNet(pipeline)


def _pipeline(spec: EvaluateSpec, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    vae_dtype = dtype_from_name(spec.settings.vae_dtype or spec.hardware.vae_dtype)
    return drawing_pipeline(spec.base_model, unet, vae_dtype, spec.settings)


def _exchanged(
    idle: UNet2DConditionModel, wanted: UNet2DConditionModel, device: torch.device
) -> UNet2DConditionModel:
    idle.to("cpu")
    return wanted.to(device)


def _load_unet(folder: Path, base: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    unet, found = UNet2DConditionModel.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    astray = sorted(
        {*found["missing_keys"], *found["unexpected_keys"]}
        | (base.state_dict().keys() ^ unet.state_dict().keys())
    )
    if astray:
        raise StageError(
            f"{folder} does not load back whole: {len(astray)} weights are astray, as {astray[0]}"
        )
    return unet.eval().requires_grad_(False)


def _load_lora(pipeline: StableDiffusionXLPipeline, weights: Path, trained_modules: int) -> None:
    with _quiet_diffusers():
        pipeline.load_lora_weights(
            weights.parent,
            weight_name=weights.name,
            adapter_name=ADAPTER,
            use_safetensors=True,
            local_files_only=True,
        )
    _require_whole(pipeline.unet, weights, trained_modules)


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Its loader warns that the file holds nothing for the text encoders; what it might warn of besides is checked after it."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)


def _require_whole(unet: UNet2DConditionModel, weights: Path, trained_modules: int) -> None:
    """Diffusers only warns of tensors it finds no place for, or that a layer lacks."""
    loaded = {f"unet.{name}" for name in get_peft_model_state_dict(unet, adapter_name=ADAPTER)}
    with safe_open(weights, framework="pt") as file:
        stored = set(file.keys())
    if loaded != stored:
        astray = sorted(loaded ^ stored)
        raise StageError(f"{weights} does not load back whole: {len(astray)} tensors differ, as {astray[0]}")
    if (adapted := len(adapted_module_names(unet))) != trained_modules:
        raise StageError(
            f"{weights} does not load back whole: it adapts {adapted} layers, but {trained_modules} were trained"
        )
