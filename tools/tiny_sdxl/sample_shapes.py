"""Image generation with the bundled pipeline, and its agreement with the prompts, measured on pixels."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from sdxl_pipeline.demo.shape_captions import canonical_caption
from sdxl_pipeline.demo.shape_measurement import agreement
from sdxl_pipeline.demo.shape_world import held_out_specs

STEPS = 20
GUIDANCE = 5.0


@torch.no_grad()
def generate(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    size: tuple[int, int] = (128, 128),
    seed: int = 0,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch: int = 16,
) -> list[Tensor]:
    """Return one image (3, H, W) in [-1, 1] per prompt; image i starts from the noise of `seed` + i."""
    images: list[Tensor] = []
    for start in range(0, len(prompts), batch):
        part = list(prompts[start : start + batch])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        samples = pipeline(
            part,
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="pt",
        ).images
        images += list(samples.float() * 2 - 1)
    return images


def measure_generation(
    pipeline: StableDiffusionXLPipeline, count: int = 64, seed: int = 11
) -> dict[str, float]:
    """Generate images of `count` held-out prompts and return the shares with correct background, color, shape, size and place."""
    specs = held_out_specs(count, seed)
    images = generate(pipeline, [canonical_caption(spec) for spec in specs])
    return {f"drawn_{key}": round(share, 4) for key, share in agreement(images, specs).items()}
