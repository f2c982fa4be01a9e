"""Images from cached prompt embeddings: no text encoder is needed, and a seed means the same image on every device."""

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

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.schema.validation import Sampler
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_pipeline
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.models.vae import decode

SAMPLERS: Final[Mapping[Sampler, type[diffusers.SchedulerMixin]]] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-a": diffusers.EulerAncestralDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "dpm++": diffusers.DPMSolverMultistepScheduler,
}
"""The values of validation_noise_scheduler."""

LEAST_SIGNAL: Final = 1e-4
"""Below this share of signal (alpha-bar) an estimate of the clean latents from predicted noise is divided by no less."""


@dataclass(frozen=True)
class Conditioning:
    """What an image is to show, and what it is guided away from."""

    prompt_embeds: Tensor  # (1, 77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (1, C2)
    negative_prompt_embeds: Tensor | None = None
    """None, as the next: what the pipeline itself takes for no negative prompt, which for SDXL is zeros."""
    negative_pooled_prompt_embeds: Tensor | None = None


def build_inference_pipeline(
    model: ResolvedModel,
    unet: UNet2DConditionModel,
    vae_dtype: torch.dtype,
    settings: TrainingSettings,
) -> StableDiffusionXLPipeline:
    """The base model's own pipeline, VAE and scheduler around `unet`, without text encoders, on the UNet's device.

    The settings may choose another scheduler (validation_noise_scheduler), and change its schedule as they change the training's.
    Raises BaseModelError for a scheduler that cannot sample that schedule.
    """
    pipeline = load_pipeline(model, vae_dtype, unet=unet, text_encoders=False)
    changed, sampler = scheduler_changes(model, settings), settings.validation_noise_scheduler
    if changed or sampler is not None:
        kind = type(pipeline.scheduler) if sampler is None else SAMPLERS[sampler]
        taken = signature(kind).parameters
        if changed.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in taken:
            raise BaseModelError(
                f"the base model's sampler {kind.__name__} cannot draw from a noise schedule that ends in pure noise "
                '(rescale_betas_zero_snr). Set validation_noise_scheduler to "euler" or "ddim"'
            )
        if "timestep_spacing" in changed and "timestep_spacing" not in taken:
            raise BaseModelError(
                f"the base model's sampler {kind.__name__} has no timestep_spacing. Leave inference_scheduler_timestep_spacing out, or "
                'set validation_noise_scheduler to "euler" or "ddim"'
            )
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changed)
    pipeline.vae.to(unet.device).eval()
    return pipeline


def scheduler_changes(model: ResolvedModel, settings: TrainingSettings) -> dict[str, Any]:
    """Return what to change in the base model's scheduler_config.json for inference with what was trained: usually nothing.

    A schedule that ends in pure noise has to be sampled from its very end (Lin et al. 2023, section 3.3), which decides the spacing
    where the settings do not.
    """
    changes = model.scheduler_overrides | settings.scheduler_changes
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
    settings: TrainingSettings,
    on_step: Callable[[], None] | None = None,
    on_estimate: Callable[[int, int, Tensor], None] | None = None,
) -> np.ndarray:
    """One image, (H, W, 3) float32 in [0, 1] unless something broke, with the validation settings. `size` is (H, W) in pixels.

    The noise comes from the CPU. Decoded here and not by the pipeline, so that the VAE may keep a precision of its own and a NaN is
    seen before it is rounded away. `on_step` is called after every denoising step; what it raises ends the drawing. `on_estimate` gets
    the number of each step, from 1, how many the sampler takes (some take two where one is asked for), and the clean latents that it
    expects at that step, (1, 4, H/8, W/8) scaled.
    """

    def after_step(
        _pipe: object, _step: int, _timestep: int, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if on_step is not None:
            on_step()
        return tensors

    def ready(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(pipeline.unet.device, pipeline.unet.dtype)

    height, width = size
    scheduler = pipeline.scheduler
    with (
        _inputs_in(scheduler, pipeline.unet.dtype),
        nullcontext() if on_estimate is None else _estimates(scheduler, on_estimate),
    ):
        latents = pipeline(
            prompt_embeds=ready(conditioning.prompt_embeds),
            pooled_prompt_embeds=ready(conditioning.pooled_prompt_embeds),
            negative_prompt_embeds=ready(conditioning.negative_prompt_embeds),
            negative_pooled_prompt_embeds=ready(conditioning.negative_pooled_prompt_embeds),
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
    """Pixels (H, W, 3) in [0, 1] as an 8-bit image; a value that is not a number shows black."""
    return Image.fromarray((np.nan_to_num(pixels) * 255).round().clip(0, 255).astype(np.uint8))


@contextmanager
def _inputs_in(scheduler: Any, dtype: torch.dtype) -> Iterator[None]:
    """Have the UNet see latents in `dtype`, as while it is trained, in whatever dtype its answers, and so the sampler's latents, are.

    Under autocast torchao's linear layers answer to float32 in float32, which does not go with what they answer to bf16.
    """
    own = scheduler.scale_model_input

    def scale_model_input(sample: Tensor, *arguments: Any) -> Tensor:
        scaled: Tensor = own(sample, *arguments)
        return scaled.to(dtype)

    scheduler.scale_model_input = scale_model_input
    try:
        yield
    finally:
        del scheduler.scale_model_input


@contextmanager
def _estimates(scheduler: Any, take: Callable[[int, int, Tensor], None]) -> Iterator[None]:
    """Give each step's number, their count and the estimate to `take`; the pipeline's own callback has nothing but the noisy latents."""
    own, number = scheduler.step, 0

    @wraps(own)  # the pipeline reads its signature
    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        nonlocal number
        number += 1
        take(number, len(scheduler.timesteps), predict_x0(scheduler, model_output, timestep, sample))
        return own(model_output, timestep, sample, **options)

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


def predict_x0(scheduler: Any, prediction: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
    """The clean latents that a prediction at a timestep implies, in float32: (B, 4, h, w) as `prediction` and `sample`.

    Of noise, x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar); of velocity, x0 = sqrt(abar) x_t - sqrt(1 - abar) v (Salimans and Ho 2022).
    """
    if scheduler.config.prediction_type == "sample":
        return prediction.float()
    noisy = scheduler.scale_model_input(
        sample, timestep
    ).float()  # of variance 1, whatever the sampler counts in
    alpha_bar = scheduler.alphas_cumprod[round(float(timestep))].to(noisy).clamp_min(LEAST_SIGNAL)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if scheduler.config.prediction_type == "v_prediction":
        return signal * noisy - noise * prediction.float()
    return (noisy - noise * prediction.float()) / signal
