"""Validation images equal those of diffusers' own pipeline, need no text encoders, and are generated at the right steps."""

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
from sdxl_pipeline.evaluation.evaluation_identity import EVALUATION_KEYS
from sdxl_pipeline.models.components import load_noise_scheduler, load_pipeline, load_text_encoders, load_unet
from sdxl_pipeline.models.conditioning import encode_prompts
from sdxl_pipeline.models.sampling import SAMPLERS, build_inference_pipeline
from sdxl_pipeline.runtime.specs import TrainSpec, ValidationImage, ValidationPrompt
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.optim.ema import EMA_LABEL
from sdxl_pipeline.training.trainer_setup import image_generator
from sdxl_pipeline.training.validation.validation_images import PlannedImage, plan_images
from sdxl_pipeline.training.validation.validation_runner import ValidationSchedule, ends_interval
from tests.support.training_datasets import NEGATIVE, PROMPT, digest, make_spec

CPU = torch.device("cpu")


@pytest.fixture
def spec(tmp_path):
    """Return a spec whose prompt embeddings in the cache come from the model's text encoders."""
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


def generate(spec, folder: Path, unet=None) -> list[ValidationImage]:
    unet = unet if unet is not None else load_unet(spec.base_model, torch.float32)
    return list(image_generator(spec, BatchReader(spec.datasets), folder).generate(unet, 12))


def planned(spec: TrainSpec, step: int) -> list[PlannedImage]:
    return plan_images(spec.prompts, spec.settings, spec.settings.effective_validation_seed, step)


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


# An empty negative prompt means none, for which the pipeline uses zeros; it would encode one that is passed.
@pytest.mark.parametrize("negative", [NEGATIVE, ""])
def test_image_generator_equal_diffusers_pipeline(spec, tmp_path, negative):
    prompt = ValidationPrompt(name="a circle!", prompt=PROMPT, negative_prompt=negative)
    (image,) = generate(spec.model_copy(update={"prompts": (prompt,)}), tmp_path / "images")
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
    actual = pixels(image.path)
    assert actual.shape == (64, 96, 3)
    assert np.abs(actual - np.asarray(expected).astype(int)).max() <= 1
    assert actual.std() > 1


def test_image_generator_restores_train_mode_and_random_state(spec, tmp_path):
    unet = load_unet(spec.base_model, torch.float32).train()
    modes: list[bool] = []
    unet.register_forward_pre_hook(lambda module, arguments: modes.append(module.training))
    state = torch.get_rng_state()
    generate(spec, tmp_path, unet)
    assert modes == [False] * 3
    assert unet.training
    assert torch.equal(torch.get_rng_state(), state)


def test_plan_images_has_one_per_prompt_size_and_seed(tmp_path):
    spec = make_spec(
        tmp_path,
        validation_disable=False,
        validation_resolution="64x64,96x64",
        num_validation_images=2,
        seed=3,
    )
    assert [(p.name, p.size, p.seed) for p in planned(spec, 0)] == [
        ("circle 64x64 1", (64, 64), 3),
        ("circle 64x64 2", (64, 64), 4),
        ("circle 96x64 1", (64, 96), 3),
        ("circle 96x64 2", (64, 96), 4),
    ]


@pytest.mark.slow
def test_image_generator_colliding_names_get_distinct_files(spec, tmp_path):
    """Names in any script, differing only in punctuation or case, too long, of the empty prompt, and of the EMA's images."""
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
        for image in image_generator(many, reader, tmp_path).generate(unet, 12, label)
    ]
    assert len({image.name for image in images}) == len({image.path.lower() for image in images}) == 24
    assert all(Path(image.path).is_file() for image in images)
    assert [image.name for image in images[:12]] == [*names[:10], "cat EMA 2", "unconditional 2"]
    stems = [Path(image.path).stem for image in images]
    assert stems[:5] == ["赤い円", "青い円", "a_b", "a_b_2", "A_b_3"]
    assert stems[9:11] == ["cat", "cat_EMA_2"]
    assert (stems[21], len(stems[5])) == ("cat_EMA", 80)


def epochs_of_four_steps(step: int) -> float:
    return step / 4


def validation_steps(folder: Path, **settings) -> list[int]:
    spec = make_spec(folder, **{"validation_disable": False, **settings})
    schedule = ValidationSchedule(spec.settings, spec.settings, bool(spec.prompts), 11, epochs_of_four_steps)
    return [step for step in range(12) if schedule.images_are_due(step)]


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
def test_images_are_due_by_interval_settings(tmp_path, settings, expected):
    assert validation_steps(tmp_path, **settings) == expected


def test_ends_interval_fraction_of_epoch_is_due_at_first_step_that_completes_it():
    def due(epoch_interval: float, steps_per_epoch: int, steps: int) -> list[int]:
        return [
            step
            for step in range(steps)
            if ends_interval(step, None, epoch_interval, lambda s: s / steps_per_epoch)
        ]

    assert due(0.5, 10, 21) == [5, 10, 15, 20]
    assert due(0.1, 30, 16) == [3, 6, 9, 12, 15]
    assert due(0.5, 3, 10) == [2, 3, 5, 6, 8, 9]  # the second of three steps completes half an epoch
    assert due(1, 1, 4) == [1, 2, 3]


def test_image_generator_unconditional_enabled_adds_empty_prompt(spec, tmp_path):
    assert [p.name for p in planned(spec, 0)] == ["circle"]
    values = {**spec.settings.model_dump(), "validation_disable_unconditional": False}
    both = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    images = generate(both, tmp_path / "images")
    assert [(image.name, image.prompt) for image in images] == [("circle", PROMPT), ("unconditional", "")]


def test_plan_images_randomized_seeds_depend_on_step(tmp_path):
    spec = make_spec(tmp_path, validation_randomize=True, validation_seed=7)
    seeds = [planned(spec, step)[0].seed for step in (0, 100, 0)]
    assert seeds[0] == seeds[2]
    assert len({*seeds, 7}) == 3


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_image_generator_sampler_changes_image(spec, tmp_path, sampler):
    (own,) = generate(spec, tmp_path / "own")
    values = {**spec.settings.model_dump(), "validation_noise_scheduler": sampler}
    other_spec = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    (first,) = generate(other_spec, tmp_path / "first")
    (again,) = generate(other_spec, tmp_path / "again")
    assert np.array_equal(pixels(first.path), pixels(again.path))
    assert pixels(first.path).std() > 1
    scheduler_config = json.loads(
        (Path(spec.base_model.path) / "scheduler/scheduler_config.json").read_text()
    )
    is_own = SAMPLERS[sampler].__name__ == scheduler_config["_class_name"]
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
def test_build_inference_pipeline_timestep_spacing_applies_to_every_sampler(spec, sampler, spacing):
    values = {"validation_noise_scheduler": sampler, "inference_scheduler_timestep_spacing": spacing}
    settings = TrainingSettings(**{**spec.settings.model_dump(), **values})
    unet = load_unet(spec.base_model, torch.float32)
    pipeline = build_inference_pipeline(
        spec.base_model, unet, torch.float32, settings, settings.scheduler_changes
    )
    assert pipeline.scheduler.config.timestep_spacing == spacing
    pipeline.scheduler.set_timesteps(4)
    first = float(pipeline.scheduler.timesteps[0])
    assert (first < 990) == (spacing == "leading")


def test_timestep_spacing_changes_image_but_not_run_identity(spec, tmp_path):
    (own,) = generate(spec, tmp_path / "own")
    values = {**spec.settings.model_dump(), "inference_scheduler_timestep_spacing": "trailing"}
    other = spec.model_copy(update={"settings": TrainingSettings(**values)})
    (trailing,) = generate(other, tmp_path / "trailing")
    assert np.abs(pixels(own.path) - pixels(trailing.path)).max() > 1
    assert settings_affecting_weights(other.settings) == settings_affecting_weights(spec.settings)
    assert "inference_scheduler_timestep_spacing" in EVALUATION_KEYS


def test_image_generator_prediction_type_applies_to_sampler(spec, tmp_path):
    (epsilon,) = generate(spec, tmp_path / "a")
    values = {**spec.settings.model_dump(), "prediction_type": "v_prediction"}
    velocity_spec = spec.model_copy(update={"settings": type(spec.settings)(**values)})
    (velocity,) = generate(velocity_spec, tmp_path / "b")
    assert np.abs(pixels(epsilon.path) - pixels(velocity.path)).max() > 10


def test_build_inference_pipeline_zero_terminal_snr_starts_at_last_timestep(spec, tmp_path):
    unet = load_unet(spec.base_model, torch.float32)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    with_zero_snr = TrainingSettings(**{**spec.settings.model_dump(), **settings})
    pipeline = build_inference_pipeline(
        spec.base_model, unet, torch.float32, with_zero_snr, with_zero_snr.scheduler_changes
    )
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]  # Lin et al. 2023, table 2
    trained_on = load_noise_scheduler(spec.base_model, with_zero_snr.scheduler_changes)
    assert trained_on.alphas_cumprod[999] == 0
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod[:999], trained_on.alphas_cumprod[:999])
    (image,) = generate(spec.model_copy(update={"settings": with_zero_snr}), tmp_path)
    assert pixels(image.path).std() > 1

    with_own = build_inference_pipeline(spec.base_model, unet, torch.float32, spec.settings, {})
    assert with_own.scheduler.config == load_pipeline(spec.base_model, torch.float32).scheduler.config


def test_image_generator_unencoded_prompt_raises(spec, tmp_path):
    other = ValidationPrompt(name="x", prompt="never seen")
    with pytest.raises(UserError, match="'never seen' has not been encoded"):
        generate(spec.model_copy(update={"prompts": (other,)}), tmp_path)
