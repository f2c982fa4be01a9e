"""Holds which optimizers, schedules and precisions may stand together, and what is said of those that may not."""

import importlib.util
import typing

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.optimization import OptimizerName
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators import optimization_rules
from sdxl_pipeline.config.validators.settings_rules import unused_settings_of


@pytest.mark.parametrize(
    ("config", "key", "told"),
    [
        ({"optimizer": "adamw_bf16", "mixed_precision": "fp16"}, "optimizer", "mixed_precision fp16"),
        ({"optimizer": "adamw_bf16", "mixed_precision": "no"}, "optimizer", "bf16"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "polynomial"}, "lr_scheduler", "averages"),
        ({"lr_scheduler": "sine"}, "lr_warmup_steps", "half the length of its wave"),
        ({"lr_scheduler": "cosine", "lr_end": "1e-4"}, "lr_end", "below learning_rate"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "lr_end", "below learning_rate"),
        ({"max_train_steps": 10, "lr_warmup_steps": 10}, "lr_warmup_steps", "never be reached"),
        ({"max_train_steps": 1, "lr_warmup_steps": 1}, "lr_warmup_steps", "never be reached"),
        ({"optimizer": "torch-sparseadam"}, "optimizer", "sparse gradients"),
        ({"optimizer": "muon"}, "optimizer", "not available yet"),
        ({"optimizer": "sdnq-adamw+no_quant"}, "optimizer", "not available yet"),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_reason(problems_of, config, key, told):
    assert told in problems_of(config)[key].message


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_every_optimizer_is_let_in(name):
    assert TrainingSettings(optimizer=name).optimizer == name


def test_a_schedule_without_a_warm_up_has_none_that_is_too_long(write_project):
    """A wave whose half is longer than the run trains in the reference."""
    load_project(write_project({"lr_scheduler": "sine", "max_train_steps": 10, "lr_warmup_steps": 11}))


def test_a_schedule_free_optimizer_reaches_its_rate_in_the_last_step_of_its_warm_up(write_project):
    config = {"optimizer": "adamw_schedulefree", "max_train_steps": 10, "lr_warmup_steps": 10}
    load_project(write_project(config))


def test_the_references_other_name_of_cosine():
    assert TrainingSettings(lr_scheduler="cosine_with_warmup").lr_scheduler == "cosine"


def test_an_optimizer_whose_package_is_missing_is_told_before_anything_is_encoded(problems_of, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        optimization_rules, "find_spec", lambda name: None if name == "optimi" else found(name)
    )
    problem = problems_of({"optimizer": "optimi-lion"})["optimizer"]
    assert "comes from torch-optimi, which is not installed" in problem.message
    assert "pip install 'sdxl-pipeline[optimizers]'" in problem.hint


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"lr_scheduler": "linear", "lr_end": 1e-6}, "lr_end = 1e-06 has no effect with lr_scheduler linear"),
        ({"lr_end": 1e-6}, "lr_end = 1e-06 has no effect with lr_scheduler constant_with_warmup"),
        ({"optimizer": "adamw_schedulefree", "lr_end": 0}, "lr_end = 0 has no effect"),
        (
            {"lr_scheduler": "cosine", "lr_num_cycles": 3},
            "lr_num_cycles = 3 has no effect with lr_scheduler cosine",
        ),
        ({"lr_scheduler": "cosine", "lr_power": 2}, "lr_power = 2 has no effect with lr_scheduler cosine"),
        ({"gradient_precision": "fp32"}, "gradient_precision = fp32 has no effect"),
        (
            {"gradient_precision": "fp32", "optimizer": "optimi-lion"},
            "gradient_precision = fp32 has no effect",
        ),
    ],
)
def test_numbers_of_another_schedule_are_spoken_of(config, told):
    (line,) = unused_settings_of(TrainingSettings(**config))
    assert line.startswith(told)


@pytest.mark.parametrize(
    "config",
    [
        {"lr_scheduler": "cosine", "lr_end": 1e-6},
        {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
        {"lr_scheduler": "polynomial", "lr_power": 2, "lr_end": 1e-6},
        {"lr_scheduler": "linear", "lr_num_cycles": 1, "lr_warmup_steps": 3},
        {"gradient_precision": "fp32", "optimizer": "adamw_bf16"},
        {"gradient_precision": "fp32", "optimizer": "optimi-lion", "model_type": "full"},
    ],
)
def test_of_those_that_are_used_nothing_is_said(config):
    assert list(unused_settings_of(TrainingSettings(**config))) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("int8dq-torchao", "no gradient comes back"),
        ("fp8-torchao", "no gradient comes back"),
        ("int4-torchao", "mslk"),
        ("fp8-transformerengine", "Transformer Engine"),
    ],
)
@pytest.mark.parametrize("key", ["base_model_precision", "text_encoder_1_precision"])
def test_precisions_that_cannot_be_had_are_refused_with_the_reason(problems_of, key, name, told):
    problem = problems_of({key: name})[key]
    assert told in problem.message
    assert "int8-quanto" in problem.hint


def test_no_interval_is_every_layer():
    assert TrainingSettings(gradient_checkpointing_interval=0).gradient_checkpointing_interval is None
    idle = unused_settings_of(
        TrainingSettings(gradient_checkpointing=False, gradient_checkpointing_interval=2)
    )
    assert any("gradient_checkpointing_interval" in line for line in idle)


def test_few_bits_that_save_nothing_are_spoken_of():
    values = {"base_model_precision": "int8-torchao"}
    assert not list(unused_settings_of(TrainingSettings(**values, gradient_checkpointing=True)))
    assert any(
        "unpacked" in line
        for line in unused_settings_of(TrainingSettings(**values, gradient_checkpointing=False))
    )


def test_values_that_spell_a_default_are_understood():
    settings = TrainingSettings(gradient_precision="none", lr_num_cycles="none", lr_end="none")
    assert (settings.gradient_precision, settings.lr_num_cycles, settings.lr_end) == ("unmodified", 1, None)


def test_a_tiny_rate_under_prodigy_is_spoken_of():
    told = list(unused_settings_of(TrainingSettings(optimizer="prodigy", learning_rate=1e-4)))
    assert any("write 1" in line for line in told)
    assert not list(unused_settings_of(TrainingSettings(optimizer="prodigy", learning_rate=1.0)))


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            {"optimizer_config": "d_coef=2"},
            "'d_coef', which 'adamw' does not take",
            "adamw takes beta1, beta2, amsgrad",
        ),
        ({"optimizer_config": "lr=1e-4"}, "'lr', which 'adamw' does not take", "write it in learning_rate"),
        ({"optimizer": "prodigy", "optimizer_config": "d_coeff=2"}, "'d_coeff'", "d_coef"),
        ({"optimizer_config": "amsgrad=3"}, "amsgrad = 3.0", "amsgrad=true"),
        ({"optimizer_config": "weight_decay=lots"}, "weight_decay = 'lots'", "write a number"),
        ({"optimizer_config": "beta1=1.5"}, "betas = (1.5, 0.999)", "below 1"),
        ({"optimizer_config": {"betas": [0.9]}}, "betas", "2 numbers"),
        ({"optimizer_config": "eps=-1"}, "eps = -1", "at least 0"),
        ({"optimizer_config": "eps=nan"}, "nan, which is not a finite number", "write a finite number"),
        ({"optimizer_config": "fused=true,foreach=true"}, "fused and foreach", "one of the two"),
    ],
)
def test_load_project_optimizer_config_is_checked_when_it_is_read(problems_of, config, message, hint):
    problem = problems_of(config)["optimizer_config"]
    assert message in problem.message
    assert hint in problem.hint


def test_load_project_optimizer_config_that_fits_is_read(write_project):
    config = {
        "optimizer": "prodigy",
        "learning_rate": 1,
        "optimizer_config": "d_coef=2,use_bias_correction=true",
    }
    load_project(write_project(config))
    load_project(write_project({"optimizer_config": {"betas": [0.9, 0.95], "eps": "1e-7"}}))
