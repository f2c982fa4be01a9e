"""Pictures drawn while training, always from the same seeds, so that one sees what the LoRA learns."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from sdxl_pipeline.protocol.specs import TrainSpec, ValidationImage, ValidationPrompt
from sdxl_pipeline.sdxl.components import load_pipeline
from sdxl_pipeline.sdxl.latents import decode
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
    device: torch.device,
    step: int,
    folder: Path,
) -> Iterator[ValidationImage]:
    """Draw the planned pictures with the UNet as it stands, one by one, into `folder`.

    No text encoder is loaded: the prompts' embeddings come from the text cache. Nothing the training computes with is changed; the
    UNet is in eval mode only while a picture is being drawn.
    """
    pipeline = validation_pipeline(spec, unet, device)
    for picture in plan_pictures(spec):
        was_training = unet.training
        unet.eval()
        try:
            image = draw_picture(pipeline, reader, spec, picture)
        finally:
            unet.train(was_training)
        path = folder / f"step-{step:08d}" / f"{_file_stem(picture.name)}.png"
        with atomic_path(path) as temporary:
            image.save(temporary, format="PNG")
        yield ValidationImage(
            step=step, name=picture.name, prompt=picture.prompt.prompt, path=str(path), seed=picture.seed
        )


def validation_pipeline(
    spec: TrainSpec, unet: UNet2DConditionModel, device: torch.device
) -> StableDiffusionXLPipeline:
    """The base model's own pipeline and scheduler around `unet`, without text encoders."""
    vae_dtype = dtype_from_name(spec.settings.vae_dtype or spec.hardware.vae_dtype)
    pipeline = load_pipeline(spec.base_model, vae_dtype, unet=unet, text_encoders=False)
    if spec.settings.prediction_type is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(
            pipeline.scheduler.config, prediction_type=spec.settings.prediction_type
        )
    pipeline.vae.to(device).eval()
    return pipeline


@torch.no_grad()
def draw_picture(
    pipeline: StableDiffusionXLPipeline, reader: BatchReader, spec: TrainSpec, picture: PlannedPicture
) -> Image.Image:
    """One picture. The noise is drawn on the CPU, so that every device starts from the same.

    Without a negative prompt the unconditional branch is what the pipeline makes it: zeros for SDXL, the encoded empty prompt for a
    model whose `force_zeros_for_empty_prompt` is off.
    """
    settings = spec.settings
    device, dtype = pipeline.vae.device, pipeline.unet.dtype
    prompt_embeds, pooled = (
        embeds.to(device, dtype) for embeds in reader.prompt_embeds(picture.prompt.prompt)
    )
    negative_embeds, negative_pooled = None, None
    if picture.prompt.negative_prompt or not pipeline.config.force_zeros_for_empty_prompt:
        negative_embeds, negative_pooled = (
            embeds.to(device, dtype) for embeds in reader.prompt_embeds(picture.prompt.negative_prompt)
        )
    height, width = picture.size
    latents = pipeline(
        prompt_embeds=prompt_embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative_embeds,
        negative_pooled_prompt_embeds=negative_pooled,
        height=height,
        width=width,
        guidance_scale=settings.validation_guidance,
        guidance_rescale=settings.validation_guidance_rescale,
        num_inference_steps=settings.validation_num_inference_steps,
        generator=torch.Generator().manual_seed(picture.seed),
        output_type="latent",
    ).images
    pixels = decode(pipeline.vae, latents)[0].permute(1, 2, 0)  # (H, W, 3) in [0, 1]
    return Image.fromarray(pixels.mul(255).round().byte().cpu().numpy())


def _file_stem(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "picture"
