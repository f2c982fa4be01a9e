"""Previews show the sampler's x0 prediction at the configured steps, do not change the image, and fail early on missing files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from sdxl_pipeline.models.base_model import BUNDLED_NAME, BUNDLED_TAESD
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.sampling import SAMPLERS, predict_x0
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.trainer_setup import image_generator
from sdxl_pipeline.training.validation.previews import Preview, Previews
from tests.support.training_datasets import make_spec

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = "bundled:tiny-taesd"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_predict_x0_true_prediction_returns_clean_latents(kind, prediction_type):
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    scheduler = kind(**BETAS, prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    for timestep in scheduler.timesteps[[2, 5, 8]]:
        alpha_bar = scheduler.alphas_cumprod[int(timestep)]
        truth = {
            "epsilon": noise,
            "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean,
            "sample": clean,
        }[prediction_type]
        noisy = scheduler.add_noise(clean, noise, timestep[None])
        # as at the start of sampling, so that the scheduler searches for the timestep
        scheduler._step_index = None
        actual = predict_x0(scheduler, truth, timestep, noisy)
        torch.testing.assert_close(actual, clean, rtol=0, atol=2e-3)


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def previews_of(spec: TrainSpec, folder: Path, on_preview: Callable[[Preview], None]) -> Previews:
    return Previews(spec.settings, spec.base_model, torch.float32, CPU, folder, on_preview)


def generate(folder: Path, **settings) -> tuple[np.ndarray, list[tuple[Preview, np.ndarray]]]:
    """Return the image and, if settings are given, its previews with their pixels at the time of the callback."""
    spec = make_spec(
        folder,
        pretrained_model_name_or_path=BUNDLED_NAME,
        validation_disable=False,
        validation_resolution="96x64",
        validation_num_inference_steps=7,
        **settings,
    )
    previewed: list[tuple[Preview, np.ndarray]] = []

    def on_preview(preview: Preview) -> None:
        previewed.append((preview, pixels_of(preview.path)))

    previews = previews_of(spec, folder / "previews", on_preview) if settings else None
    unet = load_unet(spec.base_model, torch.float32)
    generator = image_generator(spec, BatchReader(spec.datasets), folder / "images", previews)
    (image,) = generator.generate(unet, 40, " (b)")
    return pixels_of(image.path), previewed


def test_previews_converge_to_image_and_do_not_change_it(tmp_path):
    expected, no_previews = generate(tmp_path / "plain")
    image, previewed = generate(tmp_path / "previewed", validation_preview=True, validation_preview_steps=3)
    assert no_previews == []
    assert np.array_equal(expected, image)
    assert [preview.sampler_step for preview, _ in previewed] == [3, 6, 7]
    first = previewed[0][0]
    assert (first.name, first.step, first.sampler_steps) == ("circle (b)", 40, 7)
    assert first.caption == "a red circle (sampler step 3 of 7)"
    errors = [np.abs(pixels - image).mean() for _, pixels in previewed]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 12  # of 255: error of the tiny autoencoder and JPEG


def test_previews_files_keep_their_sampler_step_until_next_validation(tmp_path):
    _, previewed = generate(tmp_path, validation_preview=True, validation_preview_steps=3)
    for preview, pixels in previewed:
        assert np.array_equal(pixels_of(preview.path), pixels), preview.caption
    folder = tmp_path / "previews"
    assert sorted(path.name for path in folder.rglob("*.jpg")) == [f"circle_b-{n}.jpg" for n in (3, 6, 7)]
    previews = build_previews(folder, validation_preview_model_name_or_path=TINY)
    for step in (80, 80, 120):  # two images of one validation, and the next validation
        previews.callback_for("star", "star", "a star", step)(7, 7, torch.zeros(1, 4, 8, 8))
        assert [path.parent.name for path in folder.rglob("*.jpg")] == [f"step-{step:08d}"]


def test_previews_second_order_sampler_counts_its_model_evaluations(tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "euler", HeunDiscreteScheduler)
    _, previewed = generate(
        tmp_path, validation_preview=True, validation_preview_steps=5, validation_noise_scheduler="euler"
    )
    assert [(preview.sampler_step, preview.sampler_steps) for preview, _ in previewed] == [
        (5, 13),
        (10, 13),
        (13, 13),
    ]


def build_previews(folder: Path, **settings) -> Previews:
    return previews_of(make_spec(folder, **settings), folder, lambda preview: None)


def test_previews_invalid_autoencoder_raises_at_construction(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"validation_preview.*'/nowhere', which is not a folder"):
        build_previews(tmp_path, validation_preview_model_name_or_path="/nowhere")
    pickled = tmp_path / "pickled"
    shutil.copytree(BUNDLED_TAESD, pickled)
    weights = pickled / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors.*safetensors only"):
        build_previews(tmp_path, validation_preview_model_name_or_path=str(pickled))
    larger = tmp_path / "larger"
    shutil.copytree(BUNDLED_TAESD, larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "num_decoder_blocks": [3, 2, 2, 1]}))
    with pytest.raises(UserError, match="validation_preview"):
        build_previews(tmp_path, validation_preview_model_name_or_path=str(larger))
    truncated = tmp_path / "truncated"
    shutil.copytree(BUNDLED_TAESD, truncated)
    (truncated / weights.name).write_bytes((BUNDLED_TAESD / weights.name).read_bytes()[:5000])
    with pytest.raises(
        UserError, match=r"validation_preview: .*truncated cannot be loaded as a tiny autoencoder"
    ):
        build_previews(tmp_path, validation_preview_model_name_or_path=str(truncated))


def test_previews_default_autoencoder_offline_raises_with_hint(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"needs the tiny autoencoder madebyollin/taesdxl, which is not available.*validation_preview to false",
    ):
        # the base model is a folder, so the default is SDXL's autoencoder on the Hub
        build_previews(tmp_path)
    build_previews(tmp_path, validation_preview_model_name_or_path=TINY)
