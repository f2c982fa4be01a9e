"""Inference from cached prompt embeddings: no text encoder is needed, and a seed gives the same noise on every device."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Final

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from sdxl_pipeline.config.schema.validation import Sampler, ValidationSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_pipeline
from sdxl_pipeline.models.model_files import SCHEDULER_CONFIG, BaseModelError
from sdxl_pipeline.models.vae import decode

SAMPLERS: Final[Mapping[Sampler, type[diffusers.SchedulerMixin]]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
"""Schedulers by the values of validation_noise_scheduler."""

MIN_ALPHA_BAR: Final = 1e-4
"""Lower bound of alpha-bar when clean latents are estimated from predicted noise, which divides by its square root."""


@dataclass(frozen=True)
class Conditioning:
    """Positive and negative prompt embeddings of an image."""

    prompt_embeds: Tensor  # (1, 77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (1, C2)
    negative_prompt_embeds: Tensor | None = None
    """None, like the next: the pipeline's default without negative prompt, which for SDXL is zeros."""
    negative_pooled_prompt_embeds: Tensor | None = None


def build_inference_pipeline(
    model: ResolvedModel,
    unet: UNet2DConditionModel,
    vae_dtype: torch.dtype,
    settings: ValidationSettings,
    trained_changes: Mapping[str, Any],
) -> StableDiffusionXLPipeline:
    """Return the base model's own pipeline, VAE and scheduler around `unet`, without text encoders, on the UNet's device.

    The settings may choose another scheduler (validation_noise_scheduler); `trained_changes` are the changes that the training made to its
    schedule (`TrainingSettings.scheduler_changes`). Raises BaseModelError for a scheduler that cannot sample from that schedule.
    """
    pipeline = load_pipeline(model, vae_dtype, unet=unet, text_encoders=False)
    changed = scheduler_changes(model, settings, trained_changes)
    sampler = settings.validation_noise_scheduler
    if changed or sampler is not None:
        scheduler_class = type(pipeline.scheduler) if sampler is None else SAMPLERS[sampler]
        supported = signature(scheduler_class).parameters
        if changed.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in supported:
            raise BaseModelError(
                f"the base model's sampler {scheduler_class.__name__} cannot sample from a schedule with zero terminal SNR "
                '(rescale_betas_zero_snr). Set validation_noise_scheduler to "euler" or "ddim"'
            )
        if "timestep_spacing" in changed and "timestep_spacing" not in supported:
            raise BaseModelError(
                f"the base model's sampler {scheduler_class.__name__} has no timestep_spacing. Remove inference_scheduler_timestep_spacing, or "
                'set validation_noise_scheduler to "euler" or "ddim"'
            )
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changed)
    pipeline.vae.to(unet.device).eval()
    return pipeline


def scheduler_changes(
    model: ResolvedModel, settings: ValidationSettings, trained_changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the changes to the base model's scheduler_config.json for inference with the trained weights: usually none.

    `trained_changes` are those of the training.

    A schedule with zero terminal SNR has to be sampled from its last timestep (Lin et al. 2023, section 3.3), which requires trailing
    spacing unless the settings choose another.
    """
    changes = {**model.scheduler_overrides, **trained_changes}
    spacing = settings.inference_scheduler_timestep_spacing
    if spacing is None and changes.get("rescale_betas_zero_snr"):
        spacing = "trailing"
    return changes | ({} if spacing is None else {"timestep_spacing": spacing})


@torch.no_grad()
def sample_image(
    pipeline: StableDiffusionXLPipeline,
    conditioning: Conditioning,
    size: tuple[int, int],
    seed: int,
    settings: ValidationSettings,
    on_step: Callable[[], None] | None = None,
    on_estimate: Callable[[int, int, Tensor], None] | None = None,
) -> np.ndarray:
    """Sample one image with the validation settings: (H, W, 3) float32, in [0, 1] unless it is non-finite. `size` is (H, W) in pixels.

    The noise is sampled on the CPU. The image is decoded here rather than by the pipeline, so that the VAE may have its own dtype and a
    NaN is seen before rounding. `on_step` is called after every denoising step; an exception it raises ends the sampling. `on_estimate`
    gets the number of each step, from 1, the sampler's number of steps (some take two per requested step), and the clean latents estimated
    at that step, (1, 4, H/8, W/8) scaled.
    """

    def after_step(
        _pipe: object, _step: int, _timestep: int, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if on_step is not None:
            on_step()
        return tensors

    def to_unet(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(pipeline.unet.device, pipeline.unet.dtype)

    height, width = size
    scheduler = pipeline.scheduler
    with (
        _cast_unet_inputs(scheduler, pipeline.unet.dtype),
        nullcontext() if on_estimate is None else _report_estimates(scheduler, on_estimate),
    ):
        latents = pipeline(
            prompt_embeds=to_unet(conditioning.prompt_embeds),
            pooled_prompt_embeds=to_unet(conditioning.pooled_prompt_embeds),
            negative_prompt_embeds=to_unet(conditioning.negative_prompt_embeds),
            negative_pooled_prompt_embeds=to_unet(conditioning.negative_pooled_prompt_embeds),
            height=height,
            width=width,
            num_inference_steps=settings.validation_num_inference_steps,
            guidance_scale=settings.validation_guidance,
            guidance_rescale=settings.validation_guidance_rescale,
            generator=torch.Generator("cpu").manual_seed(seed),
            callback_on_step_end=after_step,
            output_type="latent",
        ).images
    pixels: np.ndarray = decode(pipeline.vae, latents)[0].permute(1, 2, 0).cpu().numpy()
    return pixels


def image_from_pixels(pixels: np.ndarray) -> Image.Image:
    """Convert pixels (H, W, 3) in [0, 1] to an 8-bit image; NaN becomes black."""
    return Image.fromarray((np.nan_to_num(pixels) * 255).round().clip(0, 255).astype(np.uint8))


@contextmanager
def _cast_unet_inputs(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """Cast the UNet's inputs to `dtype` as in training, whatever the dtype of its outputs, and so of the sampler's latents.

    Under autocast torchao's linear layers return float32 for float32 inputs, which does not match their outputs for bf16.
    """
    original = scheduler.scale_model_input

    def scale_model_input(sample: Tensor, *arguments: Any) -> Tensor:
        scaled: Tensor = original(sample, *arguments)
        return scaled.to(dtype)

    scheduler.scale_model_input = scale_model_input
    try:
        yield
    finally:
        del scheduler.scale_model_input


@contextmanager
def _report_estimates(scheduler: Any, callback: Callable[[int, int, Tensor], None]) -> Iterator[None]:
    """Call `callback` with each step's number, the number of steps and the estimate; the pipeline's own callback has only noisy latents."""
    original, number = scheduler.step, 0

    @wraps(original)  # the pipeline reads its signature
    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        nonlocal number
        number += 1
        callback(number, len(scheduler.timesteps), predict_x0(scheduler, model_output, timestep, sample))
        return original(model_output, timestep, sample, **options)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def predict_x0(scheduler: Any, prediction: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
    """Return the clean latents implied by a prediction at a timestep, in float32: (B, 4, h, w) like `prediction` and `sample`.

    For noise, x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar); for velocity, x0 = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans and Ho 2022).
    """
    # of variance 1, whatever the sampler's own scaling
    noisy, output = scheduler.scale_model_input(sample, timestep).float(), prediction.float()
    alpha_bar = scheduler.alphas_cumprod[round(float(timestep))].to(noisy).clamp_min(MIN_ALPHA_BAR)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    match scheduler.config.prediction_type:
        case "epsilon":
            return (noisy - noise * output) / signal
        case "v_prediction":
            return signal * noisy - noise * output
        case "sample":
            return output
        case other:
            raise BaseModelError(
                f"{SCHEDULER_CONFIG} of the base model: prediction_type is {other!r}; it must be epsilon, v_prediction or sample"
            )
