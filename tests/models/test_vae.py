"""VAE: value ranges, shapes, the distribution of the posterior, and seeds."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_vae
from sdxl_pipeline.models.vae import decode, encode_moments, pixels_from_crops, sample_latents


@pytest.fixture(scope="module")
def vae(bundled: ResolvedModel) -> AutoencoderKL:
    return load_vae(bundled, torch.float32)


def test_pixels_from_crops_span_minus_one_to_one_channels_first():
    crop = np.zeros((2, 3, 3), dtype=np.uint8)
    crop[0, 1] = (255, 0, 51)
    pixels = pixels_from_crops([crop, crop])
    assert pixels.shape == (2, 3, 2, 3)
    assert pixels.dtype == torch.float32
    assert pixels[0, :, 0, 1].tolist() == pytest.approx([1.0, -1.0, -0.6])
    assert pixels[1].min() == -1


def test_encode_moments_equals_the_vaes_posterior(vae: AutoencoderKL):
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = encode_moments(vae, pixels)
    assert mean.shape == logvar.shape == (2, 4, 8, 12)
    posterior = vae.encode(pixels).latent_dist
    assert torch.equal(mean, posterior.mean)
    assert torch.equal(logvar, posterior.logvar)


def test_sample_latents_equals_diffusers_times_the_scaling_factor(vae: AutoencoderKL):
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = encode_moments(vae, pixels)
    sampled = sample_latents(mean, logvar, 0.13025, torch.Generator().manual_seed(3))
    expected = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3)) * 0.13025
    torch.testing.assert_close(sampled, expected)


def test_sample_latents_has_the_posteriors_mean_and_deviation():
    mean = torch.full((1, 4, 100, 100), 2.0, dtype=torch.bfloat16)
    logvar = torch.full_like(mean, 2 * np.log(0.5))
    samples = sample_latents(mean, logvar, 3.0, torch.Generator().manual_seed(0))
    assert samples.dtype == torch.float32
    assert samples.mean().item() == pytest.approx(6.0, abs=0.03)
    assert samples.std().item() == pytest.approx(1.5, abs=0.03)


def test_decode_gives_images_between_zero_and_one(vae: AutoencoderKL):
    latents = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)) * 5
    pixels = decode(vae, latents)
    assert pixels.shape == (1, 3, 64, 96)
    assert pixels.dtype == torch.float32
    assert 0 <= pixels.min() <= pixels.max() <= 1
    expected = vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5
    torch.testing.assert_close(pixels, expected.clamp(0, 1))
