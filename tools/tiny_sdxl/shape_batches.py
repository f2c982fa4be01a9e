"""The UNet's training set: latents of generated images, encoded once, with their specs and frames."""

import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_pipeline.demo.render import render, render_art
from sdxl_pipeline.demo.shape_captions import ART_CAPTIONS, sample_caption
from sdxl_pipeline.demo.shape_world import BUCKETS, Spec, sample_frame, sample_world

RICH_SHARE = 0.4
_ART_SHARE = 0.03
_CHUNK = 64
# Share of the images and of the batches in each bucket.
BUCKET_SHARES = (0.5, 0.25, 0.25)

Frame = tuple[int, int, int, int]


@dataclass(frozen=True)
class Batch:
    """Scaled latents (B, 4, H/8, W/8), their captions and SDXL's time ids (B, 6)."""

    latents: Tensor
    captions: list[str]
    time_ids: Tensor


class BucketSet:
    """Images of one bucket: posterior moments (N, 8, H/8, W/8) in fp16, specs (None: abstract art), frames."""

    def __init__(self, vae: AutoencoderKL, bucket: tuple[int, int], count: int, seed: int) -> None:
        rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.bucket = bucket
        self.specs: list[Spec | None] = []
        self.frames: list[Frame] = []
        self._scaling_factor: float = vae.config.scaling_factor
        moments = []
        for _ in range(max(1, count // _CHUNK)):
            art = sum(rng.random() < _ART_SHARE for _ in range(_CHUNK))
            specs = [sample_world(rng, RICH_SHARE) for _ in range(_CHUNK - art)]
            frames = [sample_frame(rng, bucket) for _ in specs]
            images = torch.cat([render(specs, bucket, rng, frames), render_art(art, bucket, generator)])
            self.specs += [*specs, *[None] * art]
            self.frames += [*frames, *[(*bucket, 0, 0)] * art]
            moments.append(_encode(vae, images).half())
        self._moments = torch.cat(moments)

    def sample(self, size: int, rng: random.Random) -> Batch:
        """Return a random batch of `size` images; latents are sampled from their posteriors, captions from their wordings."""
        rows = [rng.randrange(len(self.specs)) for _ in range(size)]
        mean, logvar = self._moments[rows].float().chunk(2, dim=1)
        latents = (mean + (0.5 * logvar).exp() * torch.randn_like(mean)) * self._scaling_factor
        captions = []
        for row in rows:
            spec = self.specs[row]
            captions.append(rng.choice(ART_CAPTIONS) if spec is None else sample_caption(spec, rng))
        time_ids = torch.tensor([[*self.frames[row], *self.bucket] for row in rows], dtype=torch.float32)
        return Batch(latents, captions, time_ids)


def build_training_set(vae: AutoencoderKL, count: int, seed: int) -> list[BucketSet]:
    """Return about `count` images in total, by bucket."""
    return [
        BucketSet(vae, bucket, int(count * share), seed + i)
        for i, (bucket, share) in enumerate(zip(BUCKETS, BUCKET_SHARES, strict=True))
    ]


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return posterior mean and log-variance, (B, 8, H/8, W/8)."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(part).latent_dist.parameters.float() for part in images.split(16)])
