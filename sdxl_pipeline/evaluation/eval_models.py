"""The models under evaluation: the weights of one checkpoint at a time and the base model, in the same pipeline.

Weights are loaded from their exported files with diffusers' own loader, as their users load them. The device holds one UNet at a time.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn

from sdxl_pipeline.evaluation.evaluation_identity import require_weights
from sdxl_pipeline.models.adapters.adapter import (
    UNET,
    AdapterError,
    load_adapter,
    require_complete,
    scaled_adapter,
    without_adapter,
)
from sdxl_pipeline.models.components import load_text_encoders, load_unet
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.models.sampling import build_inference_pipeline
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.text_encoder_training import OnlineTextEncoder, named_encoders, text_windows

ADAPTER = "evaluated"


class EvalModel(ABC):
    """The base model in a pipeline without text encoders; `load` adds the weights of a checkpoint, `base` leaves them out for a while.

    `online_text_encoder` encodes captions and prompts if the text encoders were trained; otherwise it is None and the embeddings come
    from the caches. Loading replaces it.
    """

    pipeline: StableDiffusionXLPipeline
    online_text_encoder: OnlineTextEncoder | None = None

    def __init__(self, spec: EvaluateSpec) -> None:
        self._spec = spec
        self._dtype = dtype_from_name(spec.settings.mixed_precision or spec.hardware.mixed_precision)
        self._loaded: CheckpointWeights | None = None
        self._verified = {spec.lora.weights_path}  # by the identity of the evaluation

    def load(self, weights: CheckpointWeights) -> None:
        """Replace the weights of another checkpoint in the pipeline by these.

        Raises ChangedWeightsError for a file that is not what the training wrote, and UserError for one that does not load completely.
        """
        if weights == self._loaded:
            return
        if weights.path not in self._verified:
            require_weights(weights)
            self._verified.add(weights.path)
        self._unload()
        self._loaded = None
        self._load(Path(weights.path))
        self._loaded = weights

    @abstractmethod
    def _unload(self) -> None:
        """Put the base model into the pipeline, also after an incomplete `_load`."""

    @abstractmethod
    def _load(self, path: Path) -> None: ...

    @abstractmethod
    def base(self) -> AbstractContextManager[None]:
        """Run the block with the base model in the pipeline."""

    @abstractmethod
    def scaled(self, scale: float) -> AbstractContextManager[None]:
        """Run the block with the loaded adapter multiplied by `scale`, which is 1 for a full UNet."""

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """Run the block with the UNet on the CPU, so that the device has room for another model."""
        device = self.pipeline.unet.device
        self.pipeline.unet.to("cpu")
        try:
            yield
        finally:
            self.pipeline.unet.to(device)


class AdapterEvalModel(EvalModel):
    """A UNet, and optionally text encoders, with adapters that can be disabled."""

    def __init__(self, spec: EvaluateSpec) -> None:
        super().__init__(spec)
        self._models: dict[str, nn.Module] = {}
        self._adapted = False
        self.pipeline = _pipeline(spec, self._read_base())

    def _read_base(self) -> UNet2DConditionModel:
        device = self._spec.hardware.device
        unet = load_unet(self._spec.base_model, self._dtype).eval().to(device)
        self._models = {UNET: unet}
        if self._spec.settings.train_text_encoder:
            encoders = load_text_encoders(self._spec.base_model, self._dtype).to(device)
            self._models |= named_encoders(encoders)
            self.online_text_encoder = OnlineTextEncoder(encoders, text_windows(self._spec.datasets))
        return unet

    def _unload(self) -> None:
        if self._adapted:  # read again rather than removed, which would depend on the adapter's kind and leave wrapped layers behind
            self.pipeline.unet = None
            self._models = {}
            self.pipeline.unet = self._read_base()
            self._adapted = False

    def _load(self, path: Path) -> None:
        self._adapted = True
        _load_adapter(self._models, path, self._spec.lora.adapted_modules)

    def base(self) -> AbstractContextManager[None]:
        """Run the block with the adapters disabled."""
        return without_adapter(*self._models.values()) if self._adapted else nullcontext()

    def scaled(self, scale: float) -> AbstractContextManager[None]:
        """Run the block with the adapters multiplied by `scale`."""
        return nullcontext() if scale == 1 else scaled_adapter(self._models.values(), scale, ADAPTER)


class FullUNetEvalModel(EvalModel):
    """A fully trained UNet. The base model's UNet stays on the CPU meanwhile, so that the device holds only one of them."""

    def __init__(self, spec: EvaluateSpec) -> None:
        super().__init__(spec)
        self._device = torch.device(spec.hardware.device)
        self._base = load_unet(spec.base_model, self._dtype).eval()
        self.pipeline = _pipeline(spec, self._base.to(self._device))

    def _unload(self) -> None:
        if self.pipeline.unet is not self._base:
            self.pipeline.unet = self._base  # the trained UNet is freed before the next one is read

    def _load(self, path: Path) -> None:
        unet = _load_unet(path, self._base, self._dtype)
        self.pipeline.unet = _swap(self._base, unet, self._device)

    @contextmanager
    def base(self) -> Iterator[None]:
        """Run the block with the base model's UNet in the pipeline."""
        current = self.pipeline.unet
        if current is self._base:
            self._base.to(self._device)
            yield
            return
        self.pipeline.unet = _swap(current, self._base, self._device)
        try:
            yield
        finally:
            self.pipeline.unet = _swap(self._base, current, self._device)

    def scaled(self, scale: float) -> AbstractContextManager[None]:
        """Run the block unchanged: a full UNet has no scale."""
        if scale != 1:
            raise ValueError("a full UNet has no scale")
        return nullcontext()


def load_eval_model(spec: EvaluateSpec) -> EvalModel:
    """Load the base model; `load` adds the weights of a checkpoint."""
    return FullUNetEvalModel(spec) if spec.lora.weights_kind == "unet" else AdapterEvalModel(spec)


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


def _load_adapter(models: Mapping[str, nn.Module], weights: Path, trained_modules: int) -> None:
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
