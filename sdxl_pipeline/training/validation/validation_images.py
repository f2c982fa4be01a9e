"""Validation images, generated during training from the same seeds at every step unless randomized."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import UNet2DConditionModel

from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.precision import dtype_from_name
from sdxl_pipeline.models.sampling import build_inference_pipeline, image_from_pixels, sample_image
from sdxl_pipeline.runtime.specs import TrainSpec, ValidationImage, ValidationPrompt
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.optim.eval_weights import EMA_LABEL
from sdxl_pipeline.training.rng import derive_seed
from sdxl_pipeline.training.validation.image_file_names import distinct_names, distinct_stems, file_stem
from sdxl_pipeline.training.validation.previews import Previews

UNCONDITIONAL = ValidationPrompt(name="unconditional", prompt="")
"""The prompt that validation_disable_unconditional removes."""


@dataclass(frozen=True)
class PlannedImage:
    """One image to generate at every validation."""

    name: str  # of its row in the validation grid
    stem: str  # of its file
    prompt: ValidationPrompt
    size: tuple[int, int]  # (height, width), pixels
    seed: int


def plan_images(spec: TrainSpec, step: int) -> list[PlannedImage]:
    """Return an image per prompt, size and seed: `num_validation_images` successive seeds, the same at each step unless randomized."""
    settings = spec.settings
    sizes = settings.validation_sizes
    first_seed = settings.effective_validation_seed
    if settings.validation_randomize:
        first_seed = derive_seed(first_seed, "validation", step) % 2**32
    prompts = spec.prompts if settings.validation_disable_unconditional else (*spec.prompts, UNCONDITIONAL)
    images = []
    for prompt in prompts:
        for height, width in sizes:
            for number in range(settings.num_validation_images):
                size = [f"{width}x{height}"] if len(sizes) > 1 else []
                count = [str(number + 1)] if settings.num_validation_images > 1 else []
                name = " ".join([prompt.name, *size, *count])
                stem = "_".join([file_stem(prompt.name), *size, *count])
                images.append(PlannedImage(name, stem, prompt, (height, width), first_seed + number))
    names = distinct_names([image.name for image in images], EMA_LABEL)
    stems = distinct_stems([image.stem for image in images], _stem_suffix(EMA_LABEL))
    return [
        replace(image, name=name, stem=stem) for image, name, stem in zip(images, names, stems, strict=True)
    ]


def generate_validation_images(
    spec: TrainSpec,
    unet: UNet2DConditionModel,
    reader: BatchReader,
    step: int,
    folder: Path,
    previews: Previews | None = None,
    label: str = "",
    on_step: Callable[[], None] | None = None,
) -> Iterator[ValidationImage]:
    """Generate the planned images one by one with the current weights of `unet`, write them to `folder` and yield them.

    `label` is appended to their names when other weights of the same step generate them as well. `on_step` is called after every sampler
    step and may raise to end the generation. No text encoder is loaded: prompt embeddings come from the text cache. Nothing that the
    training computes with is changed; the UNet is in eval mode only while an image is generated.
    """
    settings = spec.settings
    vae_dtype = dtype_from_name(settings.vae_dtype or spec.hardware.vae_dtype)
    pipeline = build_inference_pipeline(spec.base_model, unet, vae_dtype, settings)
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
    for image in plan_images(spec, step):
        name, prompt = image.name + label, image.prompt.prompt
        stem = image.stem + _stem_suffix(label)
        on_preview = None if previews is None else previews.callback_for(name, stem, prompt, step)
        conditioning = reader.conditioning(prompt, image.prompt.negative_prompt, zeros)
        was_training = unet.training
        unet.eval()
        try:
            pixels = sample_image(
                pipeline, conditioning, image.size, image.seed, settings, on_step, on_preview
            )
        finally:
            unet.train(was_training)
        path = folder / f"step-{step:08d}" / f"{stem}.png"
        with atomic_path(path) as temporary:
            image_from_pixels(pixels).save(temporary, format="PNG")
        yield ValidationImage(step=step, name=name, prompt=prompt, path=str(path), seed=image.seed)


def _stem_suffix(label: str) -> str:
    return f"_{file_stem(label)}" if label else ""
