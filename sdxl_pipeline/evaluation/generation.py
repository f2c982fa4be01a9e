"""Images of any prompt with trained weights, from a run or from a released file, at any strength."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn

from sdxl_pipeline.cache.encode.encoders import load_encoders
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.gallery import find_defect, labelled_grid, read_image
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.adapters.adapter import (
    PREFIXES,
    UNET,
    AdapterError,
    load_adapter,
    require_complete,
    scaled_adapter,
)
from sdxl_pipeline.models.adapters.adapter_files import AdapterFile, read_header
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_text_encoders, load_unet
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.models.sampling import (
    Conditioning,
    build_inference_pipeline,
    image_from_pixels,
    sample_image,
)
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.text_encoder_training import OnlineTextEncoder, named_encoders
from sdxl_pipeline.training.validation.image_file_names import distinct_stems, file_stem

KOHYA_PREFIXES = dict(zip(PREFIXES, ("lora_unet_", "lora_te1_", "lora_te2_"), strict=True))
"""Prefix of a model's layers in kohya's files."""


class GeneratedImage(NamedTuple):
    """One image of `generate_images`."""

    prompt: str
    seed: int
    scale: float
    path: Path
    defect: str | None
    """The result of `find_defect`."""


class ImageGenerator:
    """A base model with its text encoders, and trained weights that are applied at a scale.

    `weights` is an adapter file, the folder of a full UNet, or None for the base model. Adapters of text encoders in the file are used.
    `windows` is the number of 77-token windows of a prompt. Raises UserError for weights that do not load completely.
    """

    def __init__(
        self,
        base_model: ResolvedModel,
        hardware: Hardware,
        settings: TrainingSettings,
        weights: Path | None,
        windows: int = 1,
    ) -> None:
        self._settings = settings
        dtype = dtype_from_name(settings.mixed_precision or hardware.mixed_precision)
        is_folder = weights is not None and weights.is_dir()
        unet = _load_unet_folder(weights, dtype) if weights and is_folder else load_unet(base_model, dtype)
        self._models: dict[str, nn.Module] = {}
        file = _read_adapter(weights) if weights and not is_folder else None
        trained = [] if file is None else [prefix for prefix in PREFIXES if _adapts(file, prefix)]
        # like the trainer, in the training's precision if they are trained; else like the cached embeddings
        encoders = (
            load_text_encoders(base_model, dtype).to(hardware.device)
            if len(trained) > 1
            else load_encoders(base_model, hardware)
        )
        if file is not None:
            models = {UNET: unet.eval().to(hardware.device), **named_encoders(encoders)}
            self._models = {prefix: models[prefix] for prefix in trained}
            _load(self._models, file)
        self._text_encoder = OnlineTextEncoder(encoders, windows)
        vae_dtype = dtype_from_name(settings.vae_dtype or hardware.vae_dtype)
        self._pipeline = build_inference_pipeline(
            base_model, unet.eval().to(hardware.device), vae_dtype, settings, settings.scheduler_changes
        )

    @property
    def has_scale(self) -> bool:
        """Whether the weights are an adapter, which can be applied at any scale."""
        return bool(self._models)

    def sample(
        self, prompt: str, negative_prompt: str, size: tuple[int, int], seed: int, scale: float = 1.0
    ) -> tuple[Image.Image, str | None]:
        """Return an image of `size` (H, W) in pixels with the validation settings, and the result of `find_defect`.

        Scale 0 is the base model. Raises UserError for a full UNet at another scale than 1.
        """
        require_scales([scale], self.has_scale)
        with self._at(scale):
            conditioning = self._conditioning(prompt, negative_prompt)
            pixels = sample_image(self._pipeline, conditioning, size, seed, self._settings)
        return image_from_pixels(pixels), find_defect(pixels)

    def _at(self, scale: float) -> AbstractContextManager[None]:
        return scaled_adapter(self._models.values(), scale) if self._models else nullcontext()

    def _conditioning(self, prompt: str, negative_prompt: str) -> Conditioning:
        """Return the embeddings of the prompts by the text encoders as they are now; their adapters change with the scale."""
        encode = self._text_encoder.encode
        positive = encode([prompt])
        if not negative_prompt and self._pipeline.config.force_zeros_for_empty_prompt:
            return Conditioning(positive["prompt_embeds"], positive["pooled_prompt_embeds"])
        negative = encode([negative_prompt])
        return Conditioning(
            positive["prompt_embeds"],
            positive["pooled_prompt_embeds"],
            negative["prompt_embeds"],
            negative["pooled_prompt_embeds"],
        )


def require_scales(scales: Sequence[float], has_scale: bool) -> None:
    """Raise UserError for a scale that is not finite, or other than 1 where the weights are no adapter."""
    if wrong := [scale for scale in scales if not math.isfinite(scale)]:
        raise UserError(f"--scale {wrong[0]:g} is not a finite number; write a strength such as 0.7")
    if not has_scale and (wrong := [scale for scale in scales if scale != 1]):
        raise UserError(
            f"--scale {wrong[0]:g} applies to adapters only, and these weights are a full UNet; remove --scale"
        )


def generate_images(
    generator: ImageGenerator,
    prompts: Sequence[str],
    negative_prompt: str,
    size: tuple[int, int],
    seeds: Sequence[int],
    scales: Sequence[float],
    folder: Path,
    on_image: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[GeneratedImage], Path]:
    """Write an image of every prompt, seed and scale to `folder`, and sheet.png: prompts and seeds down, scales across.

    `on_image` gets the number of finished images and of all images. Returns the images and the sheet's path.
    """
    require_scales(scales, generator.has_scale)
    stems = dict(zip(prompts, distinct_stems(map(file_stem, prompts)), strict=True))
    total = len(prompts) * len(seeds) * len(scales)
    written: list[GeneratedImage] = []
    for prompt in prompts:
        for seed in seeds:
            for scale in scales:
                image, defect = generator.sample(prompt, negative_prompt, size, seed, scale)
                strength = f"_scale{scale:g}" if len(scales) > 1 or scale != 1 else ""
                path = folder / f"{stems[prompt]}_seed{seed}{strength}.png"
                with atomic_path(path) as temporary:
                    image.save(temporary, format="PNG")
                written.append(GeneratedImage(prompt, seed, scale, path, defect))
                on_image(len(written), total)
    sheet = folder / "sheet.png"
    rows = [written[start : start + len(scales)] for start in range(0, len(written), len(scales))]
    columns = ["base model" if scale == 0 else f"scale {scale:g}" for scale in scales]
    images = [[read_image(image.path) for image in row] for row in rows]
    grid = labelled_grid(columns, [f"{row[0].prompt} (seed {row[0].seed})" for row in rows], images)
    with atomic_path(sheet) as temporary:
        grid.save(temporary, format="PNG")
    return written, sheet


def require_adapter(file: AdapterFile) -> None:
    """Raise UserError for a file that contains no adapter of SDXL."""
    if not any(_adapts(file, prefix) for prefix in PREFIXES):
        raise UserError(
            f"{file.path} contains no LoRA or LyCORIS adapter of SDXL; give a file in diffusers' or kohya's format"
        )


def _read_adapter(path: Path) -> AdapterFile:
    try:
        file = read_header(path)
    except AdapterError as error:
        raise UserError(str(error)) from error
    require_adapter(file)
    return file


def _adapts(file: AdapterFile, prefix: str) -> bool:
    """Return whether the file has tensors for the model of `prefix`; LyCORIS' own names are of the UNet."""
    names = (f"{prefix}.", KOHYA_PREFIXES[prefix], *(("lycoris_",) if prefix == UNET else ()))
    return any(name.startswith(names) for name in file.names)


def _load(models: dict[str, nn.Module], file: AdapterFile) -> None:
    """Load the file into `models`. Raises UserError unless every layer of the file is in them."""
    if UNET not in models:
        raise UserError(f"{file.path} contains no adapter of the UNet")
    try:
        changed = load_adapter(models, file.path)
        if any(name.startswith(f"{UNET}.") for name in file.names):
            require_complete(models, file.path)
    except AdapterError as error:
        raise UserError(f"{file.path} does not load completely: {error}") from error
    stored = {name.partition(".")[0] for name in file.names if name.startswith(("lora_unet_", "lora_te"))}
    if stored and len(stored) != (loaded := sum(map(len, changed.values()))):
        raise UserError(
            f"{file.path} does not load completely: it has {len(stored)} layers, and {loaded} of the base model were changed"
        )


def _load_unet_folder(folder: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return the UNet of a folder. Raises UserError for missing or unexpected weights."""
    try:
        unet, info = UNet2DConditionModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not the folder of a UNet: {error}") from error
    if mismatched := sorted({*info["missing_keys"], *info["unexpected_keys"]}):
        raise UserError(
            f"{folder} does not load completely: {len(mismatched)} missing or unexpected keys, such as {mismatched[0]}"
        )
    return unet.requires_grad_(False)
