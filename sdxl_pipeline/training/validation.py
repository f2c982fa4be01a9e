"""Pictures drawn while training, always from the same seeds, so that one sees what the LoRA learns."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel

from sdxl_pipeline.protocol.specs import TrainSpec, ValidationImage, ValidationPrompt
from sdxl_pipeline.sdxl.drawing import draw_pixels, drawing_pipeline, image_from_pixels
from sdxl_pipeline.sdxl.precision import dtype_from_name
from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.training.batches import BatchReader


@dataclass(frozen=True)
class PlannedPicture:
    """One picture of every validation."""

    name: str  # of its file and its row in the sheet
    prompt: ValidationPrompt
    size: tuple[int, int]  # (height, width), pixels
    seed: int


def plan_pictures(spec: TrainSpec) -> list[PlannedPicture]:
    """Every prompt at every size, `num_validation_images` times with successive seeds."""
    settings = spec.settings
    sizes = settings.validation_sizes
    pictures = []
    for prompt in spec.prompts:
        for height, width in sizes:
            for number in range(settings.num_validation_images):
                size = f" {width}x{height}" if len(sizes) > 1 else ""
                count = f" {number + 1}" if settings.num_validation_images > 1 else ""
                pictures.append(
                    PlannedPicture(
                        f"{prompt.name}{size}{count}",
                        prompt,
                        (height, width),
                        settings.effective_validation_seed + number,
                    )
                )
    return pictures


def is_validation_step(spec: TrainSpec, step: int, total_steps: int) -> bool:
    """Whether pictures are drawn at a step: at the end, and every `validation_step_interval` steps from 0 on unless that is 0."""
    if spec.settings.validation_disable or not spec.prompts:
        return False
    interval = spec.settings.validation_step_interval
    return step == total_steps or (interval > 0 and step % interval == 0)


def draw_pictures(
    spec: TrainSpec,
    unet: UNet2DConditionModel,
    reader: BatchReader,
    step: int,
    folder: Path,
) -> Iterator[ValidationImage]:
    """Draw the planned pictures with the UNet as it stands, one by one, into `folder`.

    No text encoder is loaded: the prompts' embeddings come from the text cache. Nothing the training computes with is changed; the
    UNet is in eval mode only while a picture is being drawn.
    """
    settings = spec.settings
    vae_dtype = dtype_from_name(settings.vae_dtype or spec.hardware.vae_dtype)
    pipeline = drawing_pipeline(spec.base_model, unet, vae_dtype, settings.prediction_type)
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)
    for picture in plan_pictures(spec):
        conditioning = reader.conditioning(picture.prompt.prompt, picture.prompt.negative_prompt, zeros)
        was_training = unet.training
        unet.eval()
        try:
            pixels = draw_pixels(pipeline, conditioning, picture.size, picture.seed, settings)
        finally:
            unet.train(was_training)
        path = folder / f"step-{step:08d}" / f"{_file_stem(picture.name)}.png"
        with atomic_path(path) as temporary:
            image_from_pixels(pixels).save(temporary, format="PNG")
        yield ValidationImage(
            step=step, name=picture.name, prompt=picture.prompt.prompt, path=str(path), seed=picture.seed
        )


def _file_stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "picture"
