"""Holds: a preview shows what the sampler expects, at the steps asked for, and leaves the image as it is; what is missing is told at once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image

from sdxl_pipeline.models.base_model import BUNDLED_NAME, BUNDLED_TAESD
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.sampling import SAMPLERS, predict_x0
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.validation.previews import Preview, Previews
from sdxl_pipeline.training.validation.validation_images import generate_validation_images
from tests.support.training_datasets import make_spec

CPU = torch.device("cpu")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TINY = "bundled:tiny-taesd"


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler])
def test_a_true_prediction_gives_the_clean_latents_whatever_the_sampler_counts_in(kind, prediction_type):
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
        scheduler._step_index = None  # as at the start of a drawing, so that it looks for the timestep
        found = predict_x0(scheduler, truth, timestep, noisy)
        torch.testing.assert_close(found, clean, rtol=0, atol=2e-3)


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(float)


def draw(folder: Path, **settings) -> tuple[np.ndarray, list[tuple[Preview, np.ndarray]]]:
    """The image and, where the settings ask for them, its previews, each read when it was shown."""
    spec = make_spec(
        folder,
        pretrained_model_name_or_path=BUNDLED_NAME,
        validation_disable=False,
        validation_resolution="96x64",
        validation_num_inference_steps=7,
        **settings,
    )
    shown: list[tuple[Preview, np.ndarray]] = []

    def show(preview: Preview) -> None:
        shown.append((preview, pixels_of(preview.path)))

    previews = Previews(spec, CPU, folder / "previews", show) if settings else None
    unet = load_unet(spec.base_model, torch.float32)
    (image,) = generate_validation_images(
        spec, unet, BatchReader(spec.datasets), 40, folder / "images", previews, " (b)"
    )
    return pixels_of(image.path), shown


def test_previews_come_closer_to_the_image_and_leave_it_as_it_is(tmp_path):
    alone, nothing = draw(tmp_path / "alone")
    image, shown = draw(tmp_path / "watched", validation_preview=True, validation_preview_steps=3)
    assert nothing == []
    assert np.array_equal(alone, image)
    assert [preview.sampler_step for preview, _ in shown] == [3, 6, 7]
    first = shown[0][0]
    assert (first.name, first.step, first.sampler_steps) == ("circle (b)", 40, 7)
    assert first.caption == "a red circle (sampler step 3 of 7)"
    errors = [np.abs(pixels - image).mean() for _, pixels in shown]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 12  # of 255: what the tiny autoencoder and JPEG leave out


def test_who_reads_late_sees_the_sampler_step_he_was_told_of(tmp_path):
    _, shown = draw(tmp_path, validation_preview=True, validation_preview_steps=3)
    for preview, pixels in shown:
        assert np.array_equal(pixels_of(preview.path), pixels), preview.caption
    folder = tmp_path / "previews"
    assert sorted(path.name for path in folder.rglob("*.jpg")) == [f"circle_b-{n}.jpg" for n in (3, 6, 7)]
    previews = made(folder, validation_preview_model_name_or_path=TINY)
    for step in (80, 80, 120):  # two images of one look, and the next look
        previews.of("star", "star", "a star", step)(7, 7, torch.zeros(1, 4, 8, 8))
        assert [path.parent.name for path in folder.rglob("*.jpg")] == [f"step-{step:08d}"]


def test_the_steps_of_a_sampler_that_takes_two_for_one_are_counted_as_it_takes_them(tmp_path, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "euler", HeunDiscreteScheduler)
    _, shown = draw(
        tmp_path, validation_preview=True, validation_preview_steps=5, validation_noise_scheduler="euler"
    )
    assert [(preview.sampler_step, preview.sampler_steps) for preview, _ in shown] == [
        (5, 13),
        (10, 13),
        (13, 13),
    ]


def made(folder: Path, **settings) -> Previews:
    return Previews(make_spec(folder, **settings), CPU, folder, lambda preview: None)


def test_what_cannot_be_loaded_is_told_before_anything_is_drawn(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"validation_preview.*'/nowhere', which is not a folder"):
        made(tmp_path, validation_preview_model_name_or_path="/nowhere")
    pickled = tmp_path / "pickled"
    shutil.copytree(BUNDLED_TAESD, pickled)
    weights = pickled / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"has no diffusion_pytorch_model\.safetensors.*safetensors only"):
        made(tmp_path, validation_preview_model_name_or_path=str(pickled))
    larger = tmp_path / "larger"
    shutil.copytree(BUNDLED_TAESD, larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "num_decoder_blocks": [3, 2, 2, 1]}))
    with pytest.raises(UserError, match="validation_preview"):
        made(tmp_path, validation_preview_model_name_or_path=str(larger))
    cut = tmp_path / "cut"
    shutil.copytree(BUNDLED_TAESD, cut)
    (cut / weights.name).write_bytes((BUNDLED_TAESD / weights.name).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"validation_preview: .*cut is no tiny autoencoder"):
        made(tmp_path, validation_preview_model_name_or_path=str(cut))


def test_sdxls_own_is_asked_of_the_hub_and_its_lack_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError,
        match=r"needs the tiny autoencoder madebyollin/taesdxl, which is not available.*validation_preview to false",
    ):
        made(tmp_path)  # the datasets' model is not the bundled one, but a folder
    made(tmp_path, validation_preview_model_name_or_path=TINY)
