"""The run identity changes with everything that changes the weights, and with nothing else."""

import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.key_facts import Identity, keys_with
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import (
    change_affects_weights,
    run_fingerprints,
    run_identity,
    settings_affecting_weights,
)
from tests.support.training_datasets import SQUARE, make_dataset, make_spec

DEMO = Path(__file__).parents[3] / "projects" / "demo"
DEMO_IDENTITY = "4f20f9ded1d65d1734b4111edb0f44f5934867965438393c458b495158ede292"
"""Of the demo's settings with the data of `make_dataset` and a base model of fixed digests."""
DEFAULT_SETTINGS_DIGEST = "707603a1deac413091f84a6e6e020e06a4ce602d2d1bcc517293e14bd4c95345"


@pytest.fixture
def spec(tmp_path):
    return make_spec(tmp_path)


def with_settings(spec, **settings):
    values = {**spec.settings.model_dump(), **settings}
    return spec.model_copy(update={"settings": TrainingSettings(**values)})


def test_settings_affecting_weights_contains_exactly_the_keys_compared_by_value():
    by_value = keys_with(TrainingSettings, lambda key: key.identity is Identity.VALUE)
    assert settings_affecting_weights(TrainingSettings()).keys() == {*by_value, "lora_alpha"}
    assert not {"output_dir", "validation_prompt", "pretrained_model_name_or_path"} & {*by_value}


def test_settings_affecting_weights_contains_keys_of_value_if_set_only_if_they_are_set():
    keys = keys_with(TrainingSettings, lambda key: key.identity is Identity.VALUE_IF_SET)
    assert keys == ("early_stopping_patience", "early_stopping_min_delta")
    assert not {*keys} & settings_affecting_weights(TrainingSettings(early_stopping_patience=0)).keys()
    values = {"early_stopping_patience": 3, "early_stopping_min_delta": 0.01}
    assert values.items() <= settings_affecting_weights(TrainingSettings(**values)).items()
    assert all(map(change_affects_weights, keys))


def test_run_identity_of_the_demo_is_that_of_earlier_versions(spec):
    """A new key must not change it: every finished run would be trained again."""
    digests = dict.fromkeys(spec.base_model.digests, "0" * 64)
    demo = spec.model_copy(
        update={
            "base_model": spec.base_model.model_copy(update={"digests": digests}),
            "settings": load_project(DEMO).training,
            "datasets": (spec.datasets[0].model_copy(update={"repeats": 1}),),
        }
    )
    assert run_identity(demo) == DEMO_IDENTITY
    assert digest_json(settings_affecting_weights(TrainingSettings())) == DEFAULT_SETTINGS_DIGEST


@pytest.mark.parametrize(
    "settings",
    [
        {"max_train_steps": 13},
        {"learning_rate": 2e-3},
        {"lora_rank": 3},
        {"lora_alpha": 1.0},
        {"lora_dropout": 0.1},
        {"seed": 1},
        {"train_batch_size": 1},
        {"gradient_accumulation_steps": 2},
        {"caption_dropout_probability": 0.2},
        {"snr_gamma": 5.0},
        {"prediction_type": "v_prediction"},
        {"optimizer_config": {"weight_decay": 0.0}},
        {"mixed_precision": "bf16"},
        {"micro_conditioning": "resized"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_run_identity_changes_with_settings_that_affect_weights(spec, settings):
    assert run_identity(with_settings(spec, **settings)) != run_identity(spec)


@pytest.mark.parametrize(
    "settings",
    [
        {"validation_prompt": "another", "validation_step_interval": 1, "validation_disable": False},
        {"checkpoint_step_interval": 1, "checkpoints_total_limit": 1, "resume_from_checkpoint": None},
        {"report_to": ("tensorboard",), "logging_dir": "elsewhere", "tracker_run_name": "x"},
        {"push_to_hub": True, "hub_model_id": "me/mine"},
        {"gradient_checkpointing": True, "vae_batch_size": 3},
        {"output_dir": "elsewhere"},
        {"lora_alpha": 2.0},  # equal to the rank, which is the default
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_run_identity_ignores_settings_that_do_not_affect_weights(spec, settings):
    assert run_identity(with_settings(spec, **settings)) == run_identity(spec)


@pytest.mark.parametrize(
    ("settings", "same_trajectory"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 0}, True),
        ({"lr_scheduler": "constant_with_warmup"}, True),
        ({"lr_scheduler": "sine"}, True),
        ({"lr_scheduler": "cosine"}, False),
        ({"lr_scheduler": "linear"}, False),
        ({"lr_scheduler": "polynomial"}, False),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "constant"}, True),
    ],
    ids=lambda value: value.get("lr_scheduler") if isinstance(value, dict) else None,
)
def test_trajectory_is_independent_of_length_if_the_learning_rate_is(spec, settings, same_trajectory):
    short, long, epochs, other = (
        run_fingerprints(with_settings(spec, **settings, **more))
        for more in (
            {"max_train_steps": 12},
            {"max_train_steps": 13},
            {"max_train_steps": None, "num_train_epochs": 2},
            {"max_train_steps": 12, "seed": 7},
        )
    )
    assert len({short.identity, long.identity, epochs.identity}) == 3
    assert short.any_length == long.any_length == epochs.any_length != other.any_length
    assert (short.trajectory == long.trajectory == epochs.trajectory) is same_trajectory
    assert short.trajectory != other.trajectory


STOPPING = {"early_stopping_patience": 3, "eval_steps_interval": 2}


@pytest.fixture
def held_out(tmp_path):
    """Return a spec with early stopping and held-out images."""
    held = make_dataset(tmp_path / "held", "held", splits=["eval"] * 5)
    return make_spec(tmp_path, make_dataset(tmp_path / "dataset"), held, **STOPPING)


@pytest.mark.parametrize(
    "settings",
    [
        {"early_stopping_patience": 2},
        {"early_stopping_min_delta": 0.01},
        {"eval_steps_interval": 3},
        {"eval_epoch_interval": 1},
        {"eval_timesteps": 5},
        {"num_eval_images": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_run_identity_contains_what_decides_early_stopping_only_with_patience(held_out, settings):
    with_patience = run_fingerprints(held_out)
    changed = run_fingerprints(with_settings(held_out, **settings))
    assert changed.identity != with_patience.identity
    assert changed.early_stopping != with_patience.early_stopping
    assert changed.trajectory == with_patience.trajectory

    off = {"early_stopping_patience": None, "early_stopping_min_delta": 0.0}
    plain = run_fingerprints(with_settings(held_out, **off))
    assert run_fingerprints(with_settings(held_out, **{**settings, **off})) == plain
    assert plain.trajectory == with_patience.trajectory
    assert plain.early_stopping is None


def test_run_identity_with_patience_contains_released_weights_only_of_an_ema(held_out):
    for use_ema in (True, False):
        one, other = (
            run_identity(with_settings(held_out, use_ema=use_ema, released_weights=weights))
            for weights in ("ema", "trained")
        )
        assert (one != other) is use_ema


def test_run_identity_with_patience_contains_the_held_out_images(tmp_path, held_out):
    more = make_dataset(tmp_path / "more", "held", (SQUARE,) * 6, splits=["eval"] * 6)
    other = held_out.model_copy(update={"datasets": (held_out.datasets[0], more)})
    off = {"early_stopping_patience": None}
    assert run_identity(with_settings(held_out, **off)) == run_identity(with_settings(other, **off))
    assert run_identity(held_out) != run_identity(other)


def test_run_identity_with_patience_without_held_out_images_raises(spec):
    with pytest.raises(UserError, match=r"early_stopping_patience is 3.*Set eval_holdout_share"):
        run_identity(with_settings(spec, **STOPPING))


def test_run_fingerprints_change_with_num_processes_except_the_one_without_world_size(tmp_path, spec):
    one, two = (
        run_fingerprints(
            make_spec(tmp_path, *spec.datasets, num_processes=number, allow_dataset_oversubscription=True)
        )
        for number in (1, 3)  # a batch then has more images than the dataset
    )
    assert not {one.identity, one.trajectory, one.any_length} & {two.identity, two.trajectory, two.any_length}
    assert one.any_length_or_world_size == two.any_length_or_world_size
    assert (
        one.any_length_or_world_size
        != run_fingerprints(
            with_settings(spec, seed=7, allow_dataset_oversubscription=True)
        ).any_length_or_world_size
    )


def test_run_identity_depends_on_data_content_not_location(tmp_path, spec):
    before = run_identity(spec)
    shutil.rmtree(tmp_path / "dataset")
    moved = make_spec(tmp_path, make_dataset(tmp_path / "moved"), run="elsewhere")
    assert run_identity(moved) == before

    texts = pd.read_parquet(tmp_path / "moved" / "texts.parquet")
    texts.loc[0, "embed_key"] = texts.loc[1, "embed_key"]
    texts.to_parquet(tmp_path / "moved" / "texts.parquet")
    assert run_identity(moved) != before
    assert run_identity(
        moved.model_copy(update={"datasets": (moved.datasets[0].model_copy(update={"repeats": 1}),)})
    ) != run_identity(moved)


def test_run_identity_depends_on_base_model_content_not_name(spec):
    model = spec.base_model
    moved = model.model_copy(update={"source": "another name"})
    assert run_identity(spec.model_copy(update={"base_model": moved})) == run_identity(spec)
    other = model.model_copy(update={"digests": {**model.digests, "unet": "0" * 64}})
    assert run_identity(spec.model_copy(update={"base_model": other})) != run_identity(spec)


def test_modules_about_runs_import_no_torch():
    modules = ("run_identity", "run_differences", "finished_runs", "checkpoint_files")
    names = ", ".join(f"sdxl_pipeline.training.checkpoint.{name}" for name in modules)
    code = f"import sys, {names}, sdxl_pipeline.stages.train; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
