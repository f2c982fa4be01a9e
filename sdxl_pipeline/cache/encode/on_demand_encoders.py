"""Encoders that run during training: latents and embeddings of one image or caption at a time, without the store.

One at a time, so that a result does not depend on other requests. Models are loaded at first use. The results equal those of the encode
stages except for rounding, which depends on the batch.
"""

from functools import cached_property
from pathlib import Path

from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_pipeline.cache.encode.crop_batches import read_crops
from sdxl_pipeline.cache.encode.encoder_devices import load_encoders, load_latent_encoder
from sdxl_pipeline.cache.encode.encoder_overflow import explain_embeds, explain_latents
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.data.buckets.crop_plan import Crop
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.models.conditioning import encode_tokens
from sdxl_pipeline.models.prompt_tokens import PromptTokenizer
from sdxl_pipeline.models.vae import encode_moments, pixels_from_crops
from sdxl_pipeline.runtime.stage_runner import UserError


class LatentEncoder:
    """Encodes images to latents on the device of this process."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware) -> None:
        self._base_model = base_model
        self._hardware = hardware

    @cached_property
    def _vae(self) -> AutoencoderKL:
        return load_latent_encoder(self._base_model, self._hardware)

    def encode(self, path: Path, crop: Crop, key: str | None = None) -> dict[str, Tensor]:
        """Return `mean` and `logvar` of one crop, (4, bucket_h / 8, bucket_w / 8) each, on the CPU in the VAE's dtype.

        `key` is the expected SHA-256 of the image file; None accepts any content. Raises UserError with the path when the image cannot be
        read or has changed, or when its latents are non-finite.
        """
        try:
            pixels = pixels_from_crops(read_crops(path, key, [crop]))
        except UnreadableImage as error:
            raise UserError(
                f"{path}: {error.reason}. Fix or remove it and materialize the dataset again."
            ) from error
        mean, logvar = (moment[0].cpu() for moment in encode_moments(self._vae, pixels))
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            reason = explain_latents(self._vae, self._hardware.vae_dtype, self._base_model)
            raise UserError(f"{path}: {reason}")
        return {"mean": mean, "logvar": logvar}


class CaptionEncoder:
    """Encodes captions and prompts to embeddings on the device of this process."""

    def __init__(self, base_model: ResolvedModel, hardware: Hardware, windows: int = 1) -> None:
        self._base_model = base_model
        self._hardware = hardware
        self._windows = windows

    @cached_property
    def _encoders(self) -> TextEncoders:
        return load_encoders(self._base_model, self._hardware)

    @cached_property
    def _reader(self) -> PromptTokenizer:
        return PromptTokenizer(self._encoders, self._windows)

    def encode(self, caption: str) -> dict[str, Tensor]:
        """Return `prompt_embeds` (77 * windows, C1 + C2) and `pooled_prompt_embeds` (C2) of one caption, on the CPU in the encoders' dtype.

        Raises UserError with the caption when they are non-finite.
        """
        input_ids = self._reader.to_windows(self._reader.read([caption]))
        prompt_embeds, pooled_prompt_embeds = (
            embeds[0].cpu() for embeds in encode_tokens(self._encoders, *input_ids)
        )
        if not (prompt_embeds.isfinite().all() and pooled_prompt_embeds.isfinite().all()):
            raise UserError(
                explain_embeds(self._encoders, self._hardware.text_dtype, self._base_model, caption)
            )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}
