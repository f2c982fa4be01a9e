"""Training of the AutoencoderKL on images of the world and others, and normalization of its latents to unit variance."""

import logging
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdxl_pipeline.demo.render import render, render_art
from sdxl_pipeline.demo.shape_world import BUCKETS, held_out_specs, sample_frame, sample_world
from tools.tiny_sdxl.architecture import SCALING_FACTOR, build_vae
from tools.tiny_sdxl.budget import Budget, set_learning_rate, update_average

_LOGGER = logging.getLogger(__name__)
_BATCH = 16
_CROP = 64  # three steps of four use crops: a quarter of the cost, the same details
_PEAK_RATE = 3e-3
_KL_WEIGHT = 3e-4
_RICH_SHARE = 0.6


def train_vae(folder: Path, budget: Budget, seed: int = 0) -> dict[str, float]:
    """Train, save to `folder` in diffusers' layout and return the held-out metrics.

    The loss is the mean square and half the mean absolute error, the error of the image gradients, and a small
    KL term; the posterior is that of Rombach et al. 2022.
    """
    torch.manual_seed(seed)
    rng, generator = random.Random(seed + 1), torch.Generator().manual_seed(seed + 1)
    vae = build_vae()
    parameters = list(vae.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    step = 0
    while (spent := budget.spent(step)) < 1:
        set_learning_rate(optimizer, _PEAK_RATE, step, spent)
        images = _batch(rng, generator, full=step % 4 == 0)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = _loss(images, decoded.float(), posterior.mean.float(), posterior.logvar.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_average(average, [p.detach() for p in parameters], step, 0.995)
        step += 1
        if step % 200 == 0:
            _LOGGER.info(f"vae step {step} seconds {budget.elapsed():.0f} loss {loss.item():.4f}")
        if step % 800 == 0:
            _LOGGER.info(f"vae step {step} {measure_vae(vae)}")
    with torch.no_grad():
        for parameter, value in zip(parameters, average, strict=True):
            parameter.copy_(value)
    normalize_latents(vae, random.Random(seed + 2))
    vae.save_pretrained(folder)
    return {**measure_vae(vae), "steps": step, "seconds": round(budget.elapsed())}


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, rng: random.Random) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions around the latents.

    Afterwards latents times the scaling factor have mean 0 and variance 1 over the world's images;
    reconstructions are unchanged.
    """
    channels = vae.config.latent_channels
    latents = torch.cat(
        [
            vae.encode(render([sample_world(rng, _RICH_SHARE) for _ in range(64)], bucket, rng))
            .latent_dist.mean.transpose(0, 1)
            .flatten(1)
            for bucket in BUCKETS
            for _ in range(2)
        ],
        dim=1,
    )  # (4, everything)
    mean, gain = latents.mean(1), 1 / (latents.std(1) * SCALING_FACTOR)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.bias[:channels] = (into.bias[:channels] - mean) * gain
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[channels:] += 2 * gain.log()  # these rows output the posterior's log-variance
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight /= gain[None, :, None, None]


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, count: int = 64) -> dict[str, float]:
    """Return the mean PSNR in dB of the reconstruction of held-out world images and of images unlike the world."""
    rng = random.Random(99)
    batches = {
        "psnr_world_db": render(held_out_specs(count, seed=99), (128, 128), rng),
        "psnr_unlike_db": render_art(count, (128, 128), torch.Generator().manual_seed(99)),
    }
    return {name: round(psnr(images, _reconstruct(vae, images)), 2) for name, images in batches.items()}


def psnr(images: Tensor, others: Tensor) -> float:
    """Return the mean over images of the peak signal-to-noise ratio in dB; images (B, 3, H, W) in [-1, 1]."""
    error = ((images - others.clamp(-1, 1)) / 2).pow(2).mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def _reconstruct(vae: AutoencoderKL, images: Tensor) -> Tensor:
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in images.split(16)]
    return torch.cat(parts)


def _batch(rng: random.Random, generator: torch.Generator, *, full: bool) -> Tensor:
    """Return images (16, 3, H, W) of a random bucket, or a random crop of them: half world, half art."""
    bucket = rng.choice((BUCKETS[0], *BUCKETS))
    half = _BATCH // 2
    specs = [sample_world(rng, _RICH_SHARE) for _ in range(half)]
    frames = [sample_frame(rng, bucket) for _ in specs]
    images = torch.cat([render(specs, bucket, rng, frames), render_art(_BATCH - half, bucket, generator)])
    return images if full else random_crop(images, rng)


def random_crop(images: Tensor, rng: random.Random, side: int = _CROP) -> Tensor:
    """Return the same random `side` x `side` window of all images."""
    height, width = images.shape[-2:]
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    return images[:, :, top : top + side, left : left + side].contiguous()


def _loss(images: Tensor, decoded: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    error = decoded - images
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()
    return error.pow(2).mean() + 0.5 * error.abs().mean() + 0.2 * gradients + _KL_WEIGHT * kl
