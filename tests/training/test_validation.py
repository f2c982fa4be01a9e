"""Validation pictures: what diffusers' own pipeline draws from the prompts' text, drawn without text encoders, at the right steps."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import ValidationImage, ValidationPrompt
from sdxl_pipeline.sdxl.components import load_pipeline, load_text_encoders, load_unet
from sdxl_pipeline.sdxl.text_encoding import encode_prompts
from sdxl_pipeline.store.tensor_store import TensorStore
from sdxl_pipeline.training.batches import BatchReader
from sdxl_pipeline.training.validation import draw_pictures, is_validation_step, plan_pictures
from sdxl_pipeline.training.validation_log import ValidationLog
from tests.lanes import NEGATIVE, PROMPT, digest, make_spec

CPU = torch.device("cpu")


@pytest.fixture
def spec(tmp_path):
    """A spec whose cached prompts are what the model's text encoders make of them."""
    spec = make_spec(
        tmp_path,
        validation_disable=False,
        validation_resolution="96x64",
        validation_seed=7,
        validation_guidance=5.0,
        validation_guidance_rescale=0.5,
        validation_num_inference_steps=3,
    )
    (lane,) = spec.lanes
    encoders = load_text_encoders(spec.base_model, torch.float32)
    prompts = ["", PROMPT, NEGATIVE]
    embeds, pooled = encode_prompts(encoders, prompts)
    store = TensorStore(tmp_path / "texts")
    with store.writer() as writer:
        for index, prompt in enumerate(prompts):
            writer.add(
                digest("real", prompt),
                {"prompt_embeds": embeds[index], "pooled_prompt_embeds": pooled[index]},
            )
    path = tmp_path / "prompts.parquet"
    pd.DataFrame({"prompt": prompts, "embed_key": [digest("real", prompt) for prompt in prompts]}).to_parquet(
        path
    )
    texts = lane.text_embeds.model_copy(update={"store_root": str(store.root), "prompts_path": str(path)})
    return spec.model_copy(update={"lanes": (lane.model_copy(update={"text_embeds": texts}),)})


def draw(spec, folder: Path, unet=None) -> list[ValidationImage]:
    unet = unet if unet is not None else load_unet(spec.base_model, torch.float32)
    return list(draw_pictures(spec, unet, BatchReader(spec.lanes), 12, folder))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture).astype(int)


@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_pictures_are_the_pipelines(spec, tmp_path, negative):
    prompt = ValidationPrompt(name="a circle!", prompt=PROMPT, negative_prompt=negative)
    (image,) = draw(spec.model_copy(update={"prompts": (prompt,)}), tmp_path / "pictures")
    assert (image.step, image.name, image.prompt, image.seed) == (12, "a circle!", PROMPT, 7)
    assert image.path == str(tmp_path / "pictures" / "step-00000012" / "a_circle.png")
    pipeline = load_pipeline(spec.base_model, torch.float32)
    expected = pipeline(
        PROMPT,
        negative_prompt=negative or None,
        height=64,
        width=96,
        guidance_scale=5.0,
        guidance_rescale=0.5,
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    drawn = pixels(image.path)
    assert drawn.shape == (64, 96, 3)
    assert np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1
    assert drawn.std() > 1


def test_the_unet_is_left_in_the_mode_it_was_in(spec, tmp_path):
    unet = load_unet(spec.base_model, torch.float32).train()
    modes: list[bool] = []
    unet.register_forward_pre_hook(lambda module, arguments: modes.append(module.training))
    state = torch.get_rng_state()
    draw(spec, tmp_path, unet)
    assert modes == [False] * 3
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)


def test_every_prompt_size_and_number_is_a_picture_of_its_own(tmp_path):
    spec = make_spec(
        tmp_path,
        validation_disable=False,
        validation_resolution="64x64,96x64",
        num_validation_images=2,
        seed=3,
    )
    assert [(p.name, p.size, p.seed) for p in plan_pictures(spec)] == [
        ("circle 64x64 1", (64, 64), 3),
        ("circle 64x64 2", (64, 64), 4),
        ("circle 96x64 1", (64, 96), 3),
        ("circle 96x64 2", (64, 96), 4),
    ]


def test_steps(tmp_path):
    def steps(interval, disable=False):
        spec = make_spec(tmp_path, validation_step_interval=interval, validation_disable=disable)
        return [step for step in range(12) if is_validation_step(spec, step, 11)]

    assert steps(4) == [0, 4, 8, 11]
    assert steps(0) == [11]
    assert steps(4, disable=True) == []


def test_another_prediction_type_reaches_the_sampler(spec, tmp_path):
    (epsilon,) = draw(spec, tmp_path / "a")
    values = {**spec.settings.model_dump(), "prediction_type": "v_prediction"}
    velocity_spec = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    (velocity,) = draw(velocity_spec, tmp_path / "b")
    assert np.abs(pixels(epsilon.path) - pixels(velocity.path)).max() > 10


def test_a_prompt_that_was_not_encoded_is_an_error(spec, tmp_path):
    other = ValidationPrompt(name="x", prompt="never seen")
    with pytest.raises(StageError, match="'never seen' has not been encoded"):
        draw(spec.model_copy(update={"prompts": (other,)}), tmp_path)


def make_image(run_dir: Path, step: int) -> ValidationImage:
    path = run_dir / "validation" / f"{step}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"png")
    return ValidationImage(step=step, name="x", prompt="p", path=str(path), seed=1)


def test_the_log_forgets_what_will_be_drawn_again(tmp_path):
    run_dir = tmp_path / "run"
    images = [make_image(run_dir, step) for step in (0, 4, 8)]
    log = ValidationLog(run_dir, resumed_at=0)
    for image in images:
        log.add([image])
    assert ValidationLog(run_dir, resumed_at=6).images == images[:2]
    moved = run_dir.rename(tmp_path / "moved")
    again = ValidationLog(moved, resumed_at=6)
    assert (again.has(4), again.has(8)) == (True, False)
    assert again.images[1].path == str(moved / "validation" / "4.png")
    Path(again.images[1].path).unlink()
    assert not ValidationLog(moved, resumed_at=6).has(4)
