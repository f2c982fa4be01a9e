"""Previews of validation images: the sampler's x0 prediction at a step, decoded by a tiny autoencoder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor

from sdxl_pipeline.config.schema.validation import ValidationSettings
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_tiny_autoencoder
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.models.sampling import image_from_pixels
from sdxl_pipeline.models.tiny_autoencoder import tiny_autoencoder_folder
from sdxl_pipeline.runtime.stage_runner import UserError

LONGEST_EDGE = 512
"""Of a preview, in pixels: small, because one is sent every few sampler steps."""

JPEG_QUALITY = 85


@dataclass(frozen=True)
class Preview:
    """A preview of an unfinished validation image."""

    name: str  # of the validation image
    prompt: str
    path: str  # JPEG; deleted when the next validation begins
    step: int  # of the training
    sampler_step: int
    sampler_steps: int

    @property
    def caption(self) -> str:
        """Return the prompt and the progress of the sampler."""
        return f"{self.prompt} (sampler step {self.sampler_step} of {self.sampler_steps})"


class Previews:
    """Decodes the x0 prediction every `validation_preview_steps` sampler steps and at the last, writes it to `folder` and calls `on_preview`.

    Each preview has its own file, so that a late reader still gets the right one; the files of a training step are deleted at the next.
    Raises UserError for a tiny autoencoder that is missing or cannot be loaded.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        base_model: ResolvedModel,
        dtype: torch.dtype,
        device: torch.device,
        folder: Path,
        on_preview: Callable[[Preview], None],
    ) -> None:
        try:
            autoencoder_folder = tiny_autoencoder_folder(settings, base_model)
            self._autoencoder: AutoencoderTiny = load_tiny_autoencoder(autoencoder_folder, dtype).to(device)
        except BaseModelError as error:
            raise UserError(f"config.json: validation_preview: {error}") from error
        except (
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # raised by diffusers for files that do not match
            raise UserError(
                f"config.json: validation_preview: {autoencoder_folder} cannot be loaded as a tiny autoencoder ({error})"
            ) from error
        self._interval = settings.validation_preview_steps
        self._folder, self._on_preview = folder, on_preview
        self._step: int | None = None

    def callback_for(
        self, name: str, stem: str, prompt: str, step: int
    ) -> Callable[[int, int, Tensor], None]:
        """Return the callback of `sample_image` for one image: (sampler step, number of steps, x0 latents). `stem` starts the file names."""
        folder = self._folder / f"step-{step:08d}"
        if step != self._step:
            self._step = step
            shutil.rmtree(self._folder, ignore_errors=True)

        def on_sampler_step(number: int, total: int, latents: Tensor) -> None:
            if number % self._interval and number != total:
                return
            path = folder / f"{stem}-{number:0{len(str(total))}d}.jpg"
            image = self._decode(latents)
            with atomic_path(path) as temporary:
                image.save(temporary, format="JPEG", quality=JPEG_QUALITY)
            self._on_preview(Preview(name, prompt, str(path), step, number, total))

        return on_sampler_step

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Image.Image:
        """Decode scaled latents (1, 4, h, w) to an image of at most LONGEST_EDGE pixels."""
        autoencoder = self._autoencoder
        pixels = autoencoder.decode(latents.to(autoencoder.device, autoencoder.dtype)).sample  # in [-1, 1]
        image = image_from_pixels(pixels[0].float().div(2).add(0.5).permute(1, 2, 0).cpu().numpy())
        image.thumbnail((LONGEST_EDGE, LONGEST_EDGE), Image.Resampling.BILINEAR)
        return image
