"""Validation images while they form: what the sampler expects at a step, decoded by a tiny autoencoder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.components import load_tiny_autoencoder
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.models.sampling import image_from_pixels
from sdxl_pipeline.models.tiny_autoencoder import tiny_autoencoder_folder
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError

LONGEST_EDGE = 512
"""Of a preview, in pixels: it is sent at every few sampler steps, and looked at for a second."""

JPEG_QUALITY = 85


@dataclass(frozen=True)
class Preview:
    """An image that is not finished."""

    name: str  # of the validation image
    prompt: str
    path: str  # JPEG; gone when the next look begins
    step: int  # of the training
    sampler_step: int
    sampler_steps: int

    @property
    def caption(self) -> str:
        """The prompt, and how far the image is."""
        return f"{self.prompt} (sampler step {self.sampler_step} of {self.sampler_steps})"


class Previews:
    """Decodes what an image will be at every few sampler steps and the last, writes it into `folder`, and hands it to `show`.

    Each has a file of its own, so that whoever reads it late sees what he was told of; those of one training step make room for the next.

    The autoencoder is loaded when this is made, so that one that is missing or broken is a UserError before the first step.
    """

    def __init__(
        self, spec: TrainSpec, device: torch.device, folder: Path, show: Callable[[Preview], None]
    ) -> None:
        settings = spec.settings
        dtype = dtype_from_name(settings.vae_dtype or spec.hardware.vae_dtype)
        try:
            place = tiny_autoencoder_folder(settings, spec.base_model)
            self._autoencoder: AutoencoderTiny = load_tiny_autoencoder(place, dtype).to(device)
        except BaseModelError as error:
            raise UserError(f"config.json: validation_preview: {error}") from error
        except (OSError, ValueError, RuntimeError) as error:  # as diffusers tells of a file that does not fit
            raise UserError(
                f"config.json: validation_preview: {place} is no tiny autoencoder that can be loaded ({error})"
            ) from error
        self._every = settings.validation_preview_steps
        self._folder, self._show = folder, show
        self._step: int | None = None

    def of(self, name: str, stem: str, prompt: str, step: int) -> Callable[[int, int, Tensor], None]:
        """What `sample_image` is to call with each sampler step, their count and the estimate of one image; `stem` begins its files' names."""
        folder = self._folder / f"step-{step:08d}"
        if step != self._step:
            self._step = step
            shutil.rmtree(self._folder, ignore_errors=True)

        def on_estimate(number: int, total: int, latents: Tensor) -> None:
            if number % self._every and number != total:
                return
            path = folder / f"{stem}-{number:0{len(str(total))}d}.jpg"
            image = self._decode(latents)
            with atomic_path(path) as temporary:
                image.save(temporary, format="JPEG", quality=JPEG_QUALITY)
            self._show(Preview(name, prompt, str(path), step, number, total))

        return on_estimate

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Image.Image:
        """Latents (1, 4, h, w), scaled, as an image of at most LONGEST_EDGE."""
        autoencoder = self._autoencoder
        pixels = autoencoder.decode(latents.to(autoencoder.device, autoencoder.dtype)).sample  # in [-1, 1]
        image = image_from_pixels(pixels[0].float().div(2).add(0.5).permute(1, 2, 0).cpu().numpy())
        image.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.BILINEAR)
        return image
