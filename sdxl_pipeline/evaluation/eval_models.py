"""What is evaluated: the trained model and its base model, one at a time in the same pipeline.

What was trained is loaded from its exported files by diffusers' own loader, as its users will load it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn

from sdxl_pipeline.models.adapters.adapter import (
    UNET,
    AdapterError,
    load_adapter,
    require_complete,
    without_adapter,
)
from sdxl_pipeline.models.components import load_text_encoders, load_unet
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.models.sampling import build_inference_pipeline
from sdxl_pipeline.runtime.specs import EvaluateSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.text_encoder_training import OnlineTextEncoder, named_encoders, text_windows

ADAPTER = "evaluated"


class EvalModel(ABC):
    """The trained model in a pipeline without text encoders, and its base model in its place.

    `online_text_encoder` encodes captions and prompts where the text encoders were trained; else their embeddings are in the caches.
    """

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, online_text_encoder: OnlineTextEncoder | None = None
    ) -> None:
        self.pipeline, self.online_text_encoder = pipeline, online_text_encoder

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Have the base model in the pipeline while the block runs."""


class AdapterEvalModel(EvalModel):
    """A UNet, and perhaps text encoders, with adapters that can be switched off."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        models: Mapping[str, nn.Module],
        online_text_encoder: OnlineTextEncoder | None,
    ) -> None:
        super().__init__(pipeline, online_text_encoder)
        self._models = models

    def base(self) -> AbstractContextManager[None]:
        """Switch the adapters off."""
        return without_adapter(*self._models.values())


class FullUNetEvalModel(EvalModel):
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


def load_eval_model(spec: EvaluateSpec) -> EvalModel:
    """What the training left, loaded back beside the base model.

    Raises UserError when it does not load back whole.
    """
    dtype = dtype_from_name(spec.settings.mixed_precision or spec.hardware.mixed_precision)
    base = load_unet(spec.base_model, dtype).eval()
    if spec.lora.weights_kind == "unet":
        unet = _load_unet(Path(spec.lora.weights_path), base, dtype)
        return FullUNetEvalModel(_pipeline(spec, unet.to(spec.hardware.device)), base)
    models: dict[str, nn.Module] = {UNET: base.to(spec.hardware.device)}
    online_text_encoder = None
    if spec.settings.train_text_encoder:
        encoders = load_text_encoders(spec.base_model, dtype).to(spec.hardware.device)
        models |= named_encoders(encoders)
        online_text_encoder = OnlineTextEncoder(encoders, text_windows(spec.datasets))
    _load_adapter(models, Path(spec.lora.weights_path), spec.lora.adapted_modules)
    return AdapterEvalModel(_pipeline(spec, base), models, online_text_encoder)


def _pipeline(spec: EvaluateSpec, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    vae_dtype = dtype_from_name(spec.settings.vae_dtype or spec.hardware.vae_dtype)
    return build_inference_pipeline(spec.base_model, unet, vae_dtype, spec.settings)


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
        raise UserError(
            f"{folder} does not load back whole: {len(astray)} weights are astray, as {astray[0]}"
        )
    return unet.eval().requires_grad_(False)


def _load_adapter(models: dict[str, nn.Module], weights: Path, trained_modules: int) -> None:
    try:
        with _quiet_diffusers():
            changed = load_adapter(models, weights, ADAPTER)
        require_complete(models, weights, ADAPTER)
    except AdapterError as error:
        raise UserError(f"{weights} does not load back whole: {error}") from error
    if (adapted := sum(map(len, changed.values()))) != trained_modules:
        raise UserError(
            f"{weights} does not load back whole: it adapts {adapted} layers, but {trained_modules} were trained"
        )


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Its loader warns of parts of a file that it is not asked to load; what it might warn of besides is checked after it."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
