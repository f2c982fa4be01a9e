"""Images drawn while training, always from the same seeds, so that one sees what the LoRA learns."""

import math
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
"""What validation_disable_unconditional leaves out."""


@dataclass(frozen=True)
class PlannedImage:
    """One image of every validation."""

    name: str  # of its row in the sheet
    stem: str  # of its file's name
    prompt: ValidationPrompt
    size: tuple[int, int]  # (height, width), pixels
    seed: int


def plan_images(spec: TrainSpec, step: int) -> list[PlannedImage]:
    """Every prompt at every size, `num_validation_images` times with successive seeds: the same ones at each step unless randomized."""
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
    stems = distinct_stems([image.stem for image in images], _ending(EMA_LABEL))
    return [
        replace(image, name=name, stem=stem) for image, name, stem in zip(images, names, stems, strict=True)
    ]


def is_validation_step(
    spec: TrainSpec, step: int, total_steps: int, epochs_at: Callable[[int], float]
) -> bool:
    """Whether images are drawn at a step: at the end, by the intervals in steps and epochs, and at 0 as validation_on_startup says."""
    settings = spec.settings
    draws_any = spec.prompts or not settings.validation_disable_unconditional
    if settings.validation_disable or not draws_any:
        return False
    by_steps, by_epochs = settings.validation_step_interval, settings.validation_epoch_interval
    if step == 0 and settings.validation_on_startup is not None:
        return settings.validation_on_startup
    return step == total_steps or is_due(step, by_steps, by_epochs, epochs_at)


def is_due(
    step: int, by_steps: int | None, by_epochs: float | None, epochs_at: Callable[[int], float]
) -> bool:
    """Whether a step ends an interval of steps, or is the first that completes one of epochs; step 0 ends one of steps only."""
    if by_steps and step % by_steps == 0:
        return True
    if not by_epochs or step == 0:
        return False
    # a third of an epoch, thrice, is a hair less than one
    done, before = (math.floor(epochs_at(at) / by_epochs + 1e-9) for at in (step, step - 1))
    return done > before


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
    """Draw the planned images with the UNet as it stands, one by one, into `folder`, and show them forming through `previews`.

    `label` is added to their names, where other weights of the same step draw them too. What `on_step`, called after every sampler step, raises ends the drawing.

    No text encoder is loaded: the prompts' embeddings come from the text cache. Nothing the training computes with is changed; the
    UNet is in eval mode only while an image is being drawn.
    """
    settings = spec.settings
    vae_dtype = dtype_from_name(settings.vae_dtype or spec.hardware.vae_dtype)
    pipeline = build_inference_pipeline(spec.base_model, unet, vae_dtype, settings)
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
    for image in plan_images(spec, step):
        name, prompt = image.name + label, image.prompt.prompt
        stem = image.stem + _ending(label)
        forming = None if previews is None else previews.of(name, stem, prompt, step)
        conditioning = reader.conditioning(prompt, image.prompt.negative_prompt, zeros)
        was_training = unet.training
        unet.eval()
        try:
            pixels = sample_image(pipeline, conditioning, image.size, image.seed, settings, on_step, forming)
        finally:
            unet.train(was_training)
        path = folder / f"step-{step:08d}" / f"{stem}.png"
        with atomic_path(path) as temporary:
            image_from_pixels(pixels).save(temporary, format="PNG")
        yield ValidationImage(step=step, name=name, prompt=prompt, path=str(path), seed=image.seed)


def _ending(label: str) -> str:
    return f"_{file_stem(label)}" if label else ""
