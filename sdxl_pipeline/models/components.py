"""Components of a base model as torch modules, from a folder or a single checkpoint: frozen, in eval mode, without network access.

Missing weights raise an error: a library that fills them with random numbers and a warning would train on noise.

Diffusers is imported where it is needed: that takes seconds, and text encoders in a folder need only transformers.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.model_files import (
    MODEL_INDEX,
    SCHEDULER_CONFIG,
    SINGLE_FILE_PREFIXES,
    BaseModelError,
)

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDPMScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )


@dataclass(frozen=True)
class Tokenizers:
    """The tokenizers of both text encoders."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextEncoders(Tokenizers):
    """Both text encoders with their tokenizers."""

    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection

    def to(self, device: torch.device | str) -> TextEncoders:
        """Move both encoders in place and return self."""
        self.text_encoder.to(device)
        self.text_encoder_2.to(device)
        return self


def load_vae(model: ResolvedModel, dtype: torch.dtype) -> AutoencoderKL:
    """Load the VAE in use: the model's own or its replacement.

    Raises BaseModelError for fp16 with a VAE that overflows in it (`force_upcast` in its configuration, as in SDXL's).
    """
    vae = _load_vae(model, dtype)
    if dtype == torch.float16 and vae.config.force_upcast:
        raise BaseModelError(
            f"the VAE of {model.vae_source or model.source} overflows in fp16 (force_upcast in its config.json). Set vae_dtype to bf16 "
            "or fp32, or pretrained_vae_model_name_or_path to one made for fp16, such as madebyollin/sdxl-vae-fp16-fix."
        )
    return vae


def load_tiny_autoencoder(folder: Path, dtype: torch.dtype) -> AutoencoderTiny:
    """Load the preview decoder from its folder, see `sdxl_pipeline.models.tiny_autoencoder`."""
    from diffusers import AutoencoderTiny

    loaded: AutoencoderTiny = _frozen(_from_folder(AutoencoderTiny, folder, None, dtype), str(folder))
    return loaded


def latent_scaling_factor(model: ResolvedModel) -> float:
    """Return the factor that scales latents to the unit variance expected by the UNet, without loading the VAE."""
    from diffusers import AutoencoderKL

    uses_own_vae = model.vae_path is None or Path(model.vae_path).is_file()
    folder = Path(model.config_path) / "vae" if uses_own_vae else Path(str(model.vae_path))
    default = inspect.signature(AutoencoderKL.__init__).parameters["scaling_factor"].default
    return float(AutoencoderKL.load_config(folder).get("scaling_factor", default))


def load_unet(model: ResolvedModel, dtype: torch.dtype) -> UNet2DConditionModel:
    """Load the UNet."""
    from diffusers import UNet2DConditionModel

    if model.kind == "folder":
        unet = _from_folder(
            UNet2DConditionModel, Path(model.path) / "unet", model.variants.get("unet"), dtype
        )
    else:
        unet = _from_checkpoint(UNet2DConditionModel, model, Path(model.path), "unet", dtype)
    return _frozen(unet, model.source)


def load_tokenizers(model: ResolvedModel) -> Tokenizers:
    """Load both tokenizers, for counting tokens without the encoders."""
    return Tokenizers(
        *(
            CLIPTokenizer.from_pretrained(Path(model.tokenizers_path) / name, local_files_only=True)
            for name in ("tokenizer", "tokenizer_2")
        )
    )


def load_text_encoders(model: ResolvedModel, dtype: torch.dtype) -> TextEncoders:
    """Load both text encoders and tokenizers."""
    tokenizers = load_tokenizers(model)
    return TextEncoders(
        tokenizers.tokenizer,
        tokenizers.tokenizer_2,
        _load_text_encoder(CLIPTextModel, model, "text_encoder", dtype),
        _load_text_encoder(CLIPTextModelWithProjection, model, "text_encoder_2", dtype),
    )


def load_noise_scheduler(
    model: ResolvedModel, changes: Mapping[str, Any] = MappingProxyType({})
) -> DDPMScheduler:
    """Load the forward process that the model was trained with (betas, prediction type), for adding noise in training.

    `changes` override the model's configuration (`TrainingSettings.scheduler_changes`).
    """
    from diffusers import DDPMScheduler

    return DDPMScheduler.from_config(_scheduler_config(model) | dict(changes))


def load_pipeline(
    model: ResolvedModel,
    dtype: torch.dtype,
    unet: UNet2DConditionModel | None = None,
    vae: AutoencoderKL | None = None,
    text_encoders: TextEncoders | Literal[False] | None = None,
) -> StableDiffusionXLPipeline:
    """Load diffusers' pipeline for inference, with the model's own sampler.

    Given components are used; None loads them. `text_encoders=False` omits the encoders, for calls with `prompt_embeds`. With fp16,
    diffusers itself decodes in fp32 where the VAE needs it.
    """
    from diffusers import StableDiffusionXLPipeline

    config = _scheduler_config(model)
    index = json.loads((Path(model.config_path) / MODEL_INDEX).read_text(encoding="utf-8"))
    encoders = load_text_encoders(model, dtype) if text_encoders is None else text_encoders or None
    pipeline = StableDiffusionXLPipeline(
        vae=vae if vae is not None else _load_vae(model, dtype),
        text_encoder=encoders.text_encoder if encoders else None,
        text_encoder_2=encoders.text_encoder_2 if encoders else None,
        tokenizer=encoders.tokenizer if encoders else None,
        tokenizer_2=encoders.tokenizer_2 if encoders else None,
        unet=unet if unet is not None else load_unet(model, dtype),
        scheduler=_scheduler_class(model, config).from_config(config),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", True)),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _scheduler_config(model: ResolvedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (Path(model.config_path) / SCHEDULER_CONFIG).read_text(encoding="utf-8")
    )
    return config | model.scheduler_overrides


def _scheduler_class(model: ResolvedModel, config: dict[str, Any]) -> Any:
    import diffusers

    name = str(config.get("_class_name"))
    scheduler_class = getattr(diffusers, name, None)
    if isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin):
        return scheduler_class
    raise BaseModelError(
        f"{model.config_path}/{SCHEDULER_CONFIG}: {name!r} is not a scheduler class of diffusers."
    )


def _load_vae(model: ResolvedModel, dtype: torch.dtype) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    path = Path(model.vae_path) if model.vae_path else Path(model.path)
    if path.is_file():
        vae = _from_checkpoint(AutoencoderKL, model, path, "vae", dtype)
    else:
        folder = path if model.vae_path else path / "vae"
        vae = _from_folder(AutoencoderKL, folder, model.variants.get("vae"), dtype)
    for key in ("latents_mean", "shift_factor"):
        if getattr(vae.config, key, None) is not None:
            raise BaseModelError(
                f"the VAE of {model.vae_source or model.source} normalizes latents by {key}, unlike SDXL's; the UNet expects other "
                "latents. Use a VAE of SDXL."
            )
    return _frozen(vae, model.vae_source or model.source)


def _load_text_encoder(
    encoder_class: type[PreTrainedModel], model: ResolvedModel, component: str, dtype: torch.dtype
) -> Any:
    if model.kind == "folder":
        folder, variant = Path(model.path) / component, model.variants.get(component)
        return _frozen(_from_folder(encoder_class, folder, variant, dtype), model.source)
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    path = Path(model.path)
    with _errors_as_base_model_error(model, path, component):
        encoder = create_diffusers_clip_model_from_ldm(
            encoder_class,
            _read_tensors(path, SINGLE_FILE_PREFIXES[component]),
            subfolder=component,
            config=model.config_path,
            torch_dtype=dtype,
            local_files_only=True,
        )
    return _frozen(encoder, model.source)


def _from_folder(model_class: Any, folder: Path, variant: str | None, dtype: torch.dtype) -> Any:
    dtype_argument = "dtype" if issubclass(model_class, PreTrainedModel) else "torch_dtype"
    with _no_progress_bars():
        loaded, info = model_class.from_pretrained(
            folder,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **{dtype_argument: dtype},
        )
    if missing := sorted(info["missing_keys"]):
        raise BaseModelError(
            f"{folder} lacks {len(missing)} weights of its config.json, such as {missing[0]}. Get the files again."
        )
    return loaded


def _from_checkpoint(
    model_class: Any, model: ResolvedModel, path: Path, component: str, dtype: torch.dtype
) -> Any:
    prefix = SINGLE_FILE_PREFIXES[component]
    tensors = _read_tensors(path, prefix)
    if not tensors and component == "vae":
        tensors = _read_tensors(path, "")  # a VAE-only file names its tensors without prefix
    with _errors_as_base_model_error(model, path, component):
        return model_class.from_single_file(
            tensors, config=model.config_path, subfolder=component, torch_dtype=dtype, local_files_only=True
        )


@contextmanager
def _errors_as_base_model_error(model: ResolvedModel, path: Path, component: str) -> Iterator[None]:
    """Convert errors that diffusers' converters raise on an unsuitable checkpoint to a BaseModelError."""
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    try:
        yield
    except NotImplementedError as error:  # torch cannot move a meta weight that was not loaded
        raise BaseModelError(f"{path} lacks weights of its {component}. Get the file again.") from error
    except (KeyError, RuntimeError, ValueError, SingleFileComponentError) as error:
        raise BaseModelError(
            f"{path}: its {component} does not fit {model.config_path}/{component}/config.json ({error}). "
            "A model that is not built like SDXL-base needs its configurations in a folder beside the file, with the file's name."
        ) from error


def _read_tensors(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names begin with `prefix`, under their full names; others are not read."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Disable transformers' progress bars, one per loaded file, in a stage's log."""
    enabled = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            enable_progress_bar()


def _frozen(module: Any, source: str) -> Any:
    # fast loading in diffusers and transformers leaves missing weights on the meta device
    if absent := [name for name, parameter in module.named_parameters() if parameter.is_meta]:
        raise BaseModelError(
            f"{source} lacks {len(absent)} weights, such as {absent[0]}. Get the files again."
        )
    return module.eval().requires_grad_(False)
