"""The models under evaluation: the trained model and its base model, one at a time in the same pipeline.

The trained weights are loaded from their exported files with diffusers' own loader, as their users load them.
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
    """The trained model in a pipeline without text encoders; `base()` switches to its base model.

    `online_text_encoder` encodes captions and prompts if the text encoders were trained; otherwise it is None and the embeddings come
    from the caches.
    """

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, online_text_encoder: OnlineTextEncoder | None = None
    ) -> None:
        self.pipeline, self.online_text_encoder = pipeline, online_text_encoder

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Run the block with the base model in the pipeline."""


class AdapterEvalModel(EvalModel):
    """A UNet, and optionally text encoders, with adapters that can be disabled."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        models: Mapping[str, nn.Module],
        online_text_encoder: OnlineTextEncoder | None,
    ) -> None:
        super().__init__(pipeline, online_text_encoder)
        self._models = models

    def base(self) -> AbstractContextManager[None]:
        """Run the block with the adapters disabled."""
        return without_adapter(*self._models.values())


class FullUNetEvalModel(EvalModel):
    """A fully trained UNet. The base model's UNet stays on the CPU meanwhile, so that the device holds only one of them."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, base_unet: UNet2DConditionModel) -> None:
        super().__init__(pipeline)
        self._base_unet = base_unet

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the block with the base model's UNet in the pipeline."""
        trained = self.pipeline.unet
        device = trained.device
        self.pipeline.unet = _swap(trained, self._base_unet, device)
        try:
            yield
        finally:
            self.pipeline.unet = _swap(self._base_unet, trained, device)


def load_eval_model(spec: EvaluateSpec) -> EvalModel:
    """Load the trained weights and the base model.

    Raises UserError when the exported file does not load completely.
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
    return build_inference_pipeline(
        spec.base_model, unet, vae_dtype, spec.settings, spec.settings.scheduler_changes
    )


def _swap(
    unused: UNet2DConditionModel, active: UNet2DConditionModel, device: torch.device
) -> UNet2DConditionModel:
    unused.to("cpu")
    return active.to(device)


def _load_unet(folder: Path, base: UNet2DConditionModel, dtype: torch.dtype) -> UNet2DConditionModel:
    unet, info = UNet2DConditionModel.from_pretrained(
        folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    mismatched = sorted(
        {*info["missing_keys"], *info["unexpected_keys"]}
        | (base.state_dict().keys() ^ unet.state_dict().keys())
    )
    if mismatched:
        raise UserError(
            f"{folder} does not load completely: {len(mismatched)} missing or unexpected keys, such as {mismatched[0]}"
        )
    return unet.eval().requires_grad_(False)


def _load_adapter(models: dict[str, nn.Module], weights: Path, trained_modules: int) -> None:
    try:
        with _quiet_diffusers():
            changed = load_adapter(models, weights, ADAPTER)
        require_complete(models, weights, ADAPTER)
    except AdapterError as error:
        raise UserError(f"{weights} does not load completely: {error}") from error
    if (adapted := sum(map(len, changed.values()))) != trained_modules:
        raise UserError(
            f"{weights} does not load completely: it adapts {adapted} layers, but {trained_modules} were trained"
        )


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Silence diffusers: its loader warns about parts of a file that are not to be loaded. Real mismatches are checked afterwards."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
