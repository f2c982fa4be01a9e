"""Distillation of the VAE into the AutoencoderTiny, which decodes previews of latents in a fraction of the time."""

import logging
import random
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from sdxl_pipeline.demo.render import render, render_art
from sdxl_pipeline.demo.shape_world import BUCKETS, held_out_specs, sample_world
from tools.tiny_sdxl.architecture import build_tiny_autoencoder
from tools.tiny_sdxl.budget import Budget, set_learning_rate
from tools.tiny_sdxl.train_vae import psnr, random_crop

_LOGGER = logging.getLogger(__name__)
_BATCH = 16
_PEAK_RATE = 2e-3


def train_taesd(parts: Path, budget: Budget, seed: int = 0) -> dict[str, float]:
    """Train on the VAE's scaled latents, save to `parts`/taesd, and return the held-out metrics."""
    torch.manual_seed(seed)
    rng, generator = random.Random(seed + 3), torch.Generator().manual_seed(seed + 3)
    vae = AutoencoderKL.from_pretrained(parts / "vae").eval().requires_grad_(False)
    tiny = build_tiny_autoencoder()
    parameters = list(tiny.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    step = 0
    while (spent := budget.spent(step)) < 1:
        set_learning_rate(optimizer, _PEAK_RATE, step, spent)
        bucket = rng.choice((BUCKETS[0], *BUCKETS))
        world = render([sample_world(rng, 0.6) for _ in range(_BATCH * 3 // 4)], bucket, rng)
        images = torch.cat([world, render_art(_BATCH // 4, bucket, generator)])
        if step % 4:
            images = random_crop(images, rng)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mean.float() * vae.config.scaling_factor
            encoded = tiny.encode(images).latents
            decoded = tiny.decode(latents).sample
        loss = (encoded.float() - latents).pow(2).mean() + 4 * (decoded.float() - images).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            _LOGGER.info(f"taesd step {step} seconds {budget.elapsed():.0f} loss {loss.item():.4f}")
    tiny.save_pretrained(parts / "taesd")
    return {**measure_taesd(tiny, vae), "steps": step, "seconds": round(budget.elapsed())}


@torch.no_grad()
def measure_taesd(tiny: AutoencoderTiny, vae: AutoencoderKL, count: int = 64) -> dict[str, float]:
    """Return the mean PSNR in dB of the tiny decoder on the VAE's latents of held-out world images."""
    images = render(held_out_specs(count, seed=99), (128, 128), random.Random(99))
    decoded = [
        tiny.decode(vae.encode(part).latent_dist.mode() * vae.config.scaling_factor).sample
        for part in images.split(16)
    ]
    return {"preview_psnr_world_db": round(psnr(images, torch.cat(decoded)), 2)}
