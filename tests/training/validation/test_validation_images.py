"""Validation images: what diffusers' own pipeline draws from the prompts' text, drawn without text encoders, at the right steps."""

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.schema.validation import Sampler
from sdxl_pipeline.evaluation.evaluation_identity import LOOKED_AT
from sdxl_pipeline.models.components import load_noise_scheduler, load_pipeline, load_text_encoders, load_unet
from sdxl_pipeline.models.conditioning import encode_prompts
from sdxl_pipeline.models.sampling import SAMPLERS, build_inference_pipeline
from sdxl_pipeline.runtime.specs import ValidationImage, ValidationPrompt
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.logging.validation_log import ValidationLog
from sdxl_pipeline.training.optim.eval_weights import EMA_LABEL
from sdxl_pipeline.training.validation.validation_images import (
    generate_validation_images,
    is_due,
    is_validation_step,
    plan_images,
)
from tests.support.training_datasets import NEGATIVE, PROMPT, digest, make_spec

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
    (dataset,) = spec.datasets
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
    texts = dataset.text_embeds.model_copy(update={"store_root": str(store.root), "prompts_path": str(path)})
    return spec.model_copy(update={"datasets": (dataset.model_copy(update={"text_embeds": texts}),)})


def draw(spec, folder: Path, unet=None) -> list[ValidationImage]:
    unet = unet if unet is not None else load_unet(spec.base_model, torch.float32)
    return list(generate_validation_images(spec, unet, BatchReader(spec.datasets), 12, folder))


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# An empty negative prompt is none, for which the pipeline takes zeros; it would encode one that is given to it.
@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_images_are_the_pipelines(spec, tmp_path, negative):
    prompt = ValidationPrompt(name="a circle!", prompt=PROMPT, negative_prompt=negative)
    (image,) = draw(spec.model_copy(update={"prompts": (prompt,)}), tmp_path / "images")
    assert (image.step, image.name, image.prompt, image.seed) == (12, "a circle!", PROMPT, 7)
    assert image.path == str(tmp_path / "images" / "step-00000012" / "a_circle.png")
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


def test_every_prompt_size_and_number_is_an_image_of_its_own(tmp_path):
    spec = make_spec(
        tmp_path,
        validation_disable=False,
        validation_resolution="64x64,96x64",
        num_validation_images=2,
        seed=3,
    )
    assert [(p.name, p.size, p.seed) for p in plan_images(spec, 0)] == [
        ("circle 64x64 1", (64, 64), 3),
        ("circle 64x64 2", (64, 64), 4),
        ("circle 96x64 1", (64, 96), 3),
        ("circle 96x64 2", (64, 96), 4),
    ]


def test_no_image_takes_the_place_of_another(spec, tmp_path):
    """Names in any script, alike but for signs or case, longer than a file's, of the empty prompt, and of the average's images."""
    names = [
        "赤い円",
        "青い円",
        "a b",
        "a_b",
        "A b",
        "ab" * 150,
        "ab" * 150 + "c",
        "円" * 300,
        "unconditional",
        "cat",
        "cat EMA",
    ]
    prompts = [ValidationPrompt(name=name, prompt=PROMPT, negative_prompt=NEGATIVE) for name in names]
    values = {
        **spec.settings.model_dump(),
        "validation_disable_unconditional": False,
        "validation_resolution": "32x32",
        "validation_num_inference_steps": 1,
    }
    many = spec.model_copy(update={"settings": TrainingSettings(**values), "prompts": tuple(prompts)})
    unet, reader = load_unet(spec.base_model, torch.float32), BatchReader(spec.datasets)
    images = [
        image
        for label in ("", EMA_LABEL)
        for image in generate_validation_images(many, unet, reader, 12, tmp_path, None, label)
    ]
    assert len({image.name for image in images}) == len({image.path.lower() for image in images}) == 24
    assert all(Path(image.path).is_file() for image in images)
    assert [image.name for image in images[:12]] == [*names[:10], "cat EMA 2", "unconditional 2"]
    stems = [Path(image.path).stem for image in images]
    assert stems[:5] == ["赤い円", "青い円", "a_b", "a_b_2", "A_b_3"]
    assert stems[9:11] == ["cat", "cat_EMA_2"]
    assert (stems[21], len(stems[5])) == ("cat_EMA", 80)


def at_four_steps_an_epoch(step: int) -> float:
    return step / 4


def drawn_steps(folder: Path, **settings) -> list[int]:
    spec = make_spec(folder, **{"validation_disable": False, **settings})
    return [step for step in range(12) if is_validation_step(spec, step, 11, at_four_steps_an_epoch)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"validation_step_interval": 4}, [0, 4, 8, 11]),
        ({"validation_step_interval": 0}, [11]),
        ({"validation_step_interval": 4, "validation_disable": True}, []),
        ({"validation_step_interval": 6, "validation_epoch_interval": 1}, [0, 4, 6, 8, 11]),
        ({"validation_step_interval": 0, "validation_epoch_interval": 2}, [8, 11]),
        ({"validation_step_interval": 4, "validation_on_startup": False}, [4, 8, 11]),
        ({"validation_step_interval": 0, "validation_on_startup": True}, [0, 11]),
    ],
)
def test_steps(tmp_path, settings, expected):
    assert drawn_steps(tmp_path, **settings) == expected


def test_parts_of_an_epoch_come_when_they_are_whole():
    def due(by_epochs: float, steps_an_epoch: int, steps: int) -> list[int]:
        return [step for step in range(steps) if is_due(step, None, by_epochs, lambda s: s / steps_an_epoch)]

    assert due(0.5, 10, 21) == [5, 10, 15, 20]
    assert due(0.1, 30, 16) == [3, 6, 9, 12, 15]
    assert due(0.5, 3, 10) == [2, 3, 5, 6, 8, 9]  # half an epoch of three steps is over after the second
    assert due(1, 1, 4) == [1, 2, 3]


def test_the_empty_prompt_is_drawn_when_asked_for(spec, tmp_path):
    assert [p.name for p in plan_images(spec, 0)] == ["circle"]
    values = {**spec.settings.model_dump(), "validation_disable_unconditional": False}
    both = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    images = draw(both, tmp_path / "images")
    assert [(image.name, image.prompt) for image in images] == [("circle", PROMPT), ("unconditional", "")]


def test_randomized_seeds_are_a_function_of_the_step(tmp_path):
    spec = make_spec(tmp_path, validation_randomize=True, validation_seed=7)
    seeds = [plan_images(spec, step)[0].seed for step in (0, 100, 0)]
    assert seeds[0] == seeds[2]
    assert len({*seeds, 7}) == 3


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_every_sampler_draws_an_image_of_its_own(spec, tmp_path, sampler):
    (own,) = draw(spec, tmp_path / "own")
    values = {**spec.settings.model_dump(), "validation_noise_scheduler": sampler}
    other_spec = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    (first,) = draw(other_spec, tmp_path / "first")
    (again,) = draw(other_spec, tmp_path / "again")
    assert np.array_equal(pixels(first.path), pixels(again.path))
    assert pixels(first.path).std() > 1
    model_has = json.loads((Path(spec.base_model.path) / "scheduler/scheduler_config.json").read_text())
    is_own = SAMPLERS[sampler].__name__ == model_has["_class_name"]
    assert np.array_equal(pixels(own.path), pixels(first.path)) == is_own


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [
        (None, "leading"),
        ("unipc", "linspace"),
        (None, "trailing"),
        *((each, "trailing") for each in get_args(Sampler)),
    ],
)
def test_drawing_pipeline_timestep_spacing_reaches_every_sampler(spec, sampler, spacing):
    values = {"validation_noise_scheduler": sampler, "inference_scheduler_timestep_spacing": spacing}
    settings = TrainingSettings(**{**spec.settings.model_dump(), **values})
    unet = load_unet(spec.base_model, torch.float32)
    pipeline = build_inference_pipeline(spec.base_model, unet, torch.float32, settings)
    assert pipeline.scheduler.config.timestep_spacing == spacing
    pipeline.scheduler.set_timesteps(4)
    first = float(pipeline.scheduler.timesteps[0])
    assert (first < 990) == (spacing == "leading")


def test_validation_timestep_spacing_changes_the_image_and_not_the_run(spec, tmp_path):
    (own,) = draw(spec, tmp_path / "own")
    values = {**spec.settings.model_dump(), "inference_scheduler_timestep_spacing": "trailing"}
    other = spec.model_copy(update={"settings": TrainingSettings(**values)})
    (trailing,) = draw(other, tmp_path / "trailing")
    assert np.abs(pixels(own.path) - pixels(trailing.path)).max() > 1
    assert settings_affecting_weights(other.settings) == settings_affecting_weights(spec.settings)
    assert "inference_scheduler_timestep_spacing" in LOOKED_AT


def test_another_prediction_type_reaches_the_sampler(spec, tmp_path):
    (epsilon,) = draw(spec, tmp_path / "a")
    values = {**spec.settings.model_dump(), "prediction_type": "v_prediction"}
    velocity_spec = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    (velocity,) = draw(velocity_spec, tmp_path / "b")
    assert np.abs(pixels(epsilon.path) - pixels(velocity.path)).max() > 10


def test_zero_terminal_snr_is_drawn_from_pure_noise(spec, tmp_path):
    unet = load_unet(spec.base_model, torch.float32)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with_zero_snr = TrainingSettings(**{**spec.settings.model_dump(), **settings})
    pipeline = build_inference_pipeline(spec.base_model, unet, torch.float32, with_zero_snr)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]  # Lin et al. 2023, table 2
    trained_on = load_noise_scheduler(spec.base_model, with_zero_snr.scheduler_changes)
    assert trained_on.alphas_cumprod[999] == 0
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod[:999], trained_on.alphas_cumprod[:999])
    (image,) = draw(spec.model_copy(update={"settings": with_zero_snr}), tmp_path)
    assert pixels(image.path).std() > 1

    with_own = build_inference_pipeline(spec.base_model, unet, torch.float32, spec.settings)
    assert with_own.scheduler.config == load_pipeline(spec.base_model, torch.float32).scheduler.config


def test_a_prompt_that_was_not_encoded_is_an_error(spec, tmp_path):
    other = ValidationPrompt(name="x", prompt="never seen")
    with pytest.raises(UserError, match="'never seen' has not been encoded"):
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
