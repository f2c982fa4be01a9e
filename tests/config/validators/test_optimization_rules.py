"""Valid and invalid combinations of optimizers, schedules and precisions."""

import importlib.util
import typing

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.schema.optimization import OptimizerName
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators import optimization_rules
from sdxl_pipeline.config.validators.settings_rules import unused_training_settings


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        ({"optimizer": "adamw_bf16", "mixed_precision": "fp16"}, "optimizer", "mixed_precision is fp16"),
        ({"optimizer": "adamw_bf16", "mixed_precision": "no"}, "optimizer", "bf16"),
        ({"optimizer": "adamw_schedulefree", "lr_scheduler": "polynomial"}, "lr_scheduler", "averages"),
        ({"lr_scheduler": "sine"}, "lr_warmup_steps", "half the period of lr_scheduler sine"),
        ({"lr_scheduler": "cosine", "lr_end": "1e-4"}, "lr_end", "below learning_rate"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "lr_end", "below learning_rate"),
        ({"max_train_steps": 10, "lr_warmup_steps": 10}, "lr_warmup_steps", "never be reached"),
        ({"max_train_steps": 1, "lr_warmup_steps": 1}, "lr_warmup_steps", "never be reached"),
        ({"optimizer": "torch-sparseadam"}, "optimizer", "sparse gradients"),
        ({"optimizer": "muon"}, "optimizer", "not supported"),
        ({"optimizer": "sdnq-adamw+no_quant"}, "optimizer", "not supported"),
    ],
)
def test_check_optimization_invalid_combination_reports_the_reason(problems_of, config, key, expected):
    assert expected in problems_of(config)[key].message


@pytest.mark.parametrize("name", typing.get_args(OptimizerName))
def test_check_optimization_every_optimizer_is_valid(name):
    assert TrainingSettings(optimizer=name).optimizer == name


def test_check_training_schedule_without_warmup_accepts_any_length(write_project):
    """A wave whose half is longer than the run trains in the reference."""
    load_project(write_project({"lr_scheduler": "sine", "max_train_steps": 10, "lr_warmup_steps": 11}))


def test_longest_warmup_of_schedule_free_optimizer_is_the_number_of_steps(write_project):
    config = {"optimizer": "adamw_schedulefree", "max_train_steps": 10, "lr_warmup_steps": 10}
    load_project(write_project(config))


def test_lr_scheduler_cosine_with_warmup_is_cosine():
    assert TrainingSettings(lr_scheduler="cosine_with_warmup").lr_scheduler == "cosine"


def test_check_optimization_missing_package_is_a_problem(problems_of, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        optimization_rules, "find_spec", lambda name: None if name == "optimi" else find_spec(name)
    )
    problem = problems_of({"optimizer": "optimi-lion"})["optimizer"]
    assert "needs the package torch-optimi, which is not installed" in problem.message
    assert "pip install 'sdxl-pipeline[optimizers]'" in problem.hint


@pytest.mark.parametrize(
    ("config", "expected"),
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
def test_unused_optimization_settings_of_another_schedule_are_reported(config, expected):
    (line,) = unused_training_settings(TrainingSettings(**config))
    assert line.startswith(expected)


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
def test_unused_optimization_settings_used_ones_are_not_reported(config):
    assert list(unused_training_settings(TrainingSettings(**config))) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8dq-torchao", "no backward pass"),
        ("fp8-torchao", "no backward pass"),
        ("int4-torchao", "mslk"),
        ("fp8-transformerengine", "Transformer Engine"),
    ],
)
@pytest.mark.parametrize("key", ["base_model_precision", "text_encoder_1_precision"])
def test_unsupported_precision_is_a_problem_with_the_reason(problems_of, key, name, expected):
    problem = problems_of({key: name})[key]
    assert expected in problem.message
    assert "int8-quanto" in problem.hint


def test_gradient_checkpointing_interval_zero_is_none():
    assert TrainingSettings(gradient_checkpointing_interval=0).gradient_checkpointing_interval is None
    unused = unused_training_settings(
        TrainingSettings(gradient_checkpointing=False, gradient_checkpointing_interval=2)
    )
    assert any("gradient_checkpointing_interval" in line for line in unused)


def test_unused_optimization_settings_torchao_without_checkpointing_is_reported():
    values = {"base_model_precision": "int8-torchao"}
    assert not list(unused_training_settings(TrainingSettings(**values, gradient_checkpointing=True)))
    assert any(
        "retains dequantized weights" in line
        for line in unused_training_settings(TrainingSettings(**values, gradient_checkpointing=False))
    )


def test_none_selects_the_default():
    settings = TrainingSettings(gradient_precision="none", lr_num_cycles="none", lr_end="none")
    assert (settings.gradient_precision, settings.lr_num_cycles, settings.lr_end) == ("unmodified", 1, None)


def test_unused_optimization_settings_prodigy_with_small_rate_is_reported():
    expected = list(unused_training_settings(TrainingSettings(optimizer="prodigy", learning_rate=1e-4)))
    assert any("write 1" in line for line in expected)
    assert not list(unused_training_settings(TrainingSettings(optimizer="prodigy", learning_rate=1.0)))


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        (
            {"optimizer_config": "d_coef=2"},
            "'d_coef', which 'adamw' does not accept",
            "adamw accepts beta1, beta2, amsgrad",
        ),
        ({"optimizer_config": "lr=1e-4"}, "'lr', which 'adamw' does not accept", "write it in learning_rate"),
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
def test_load_project_invalid_optimizer_config_is_a_problem(problems_of, config, message, hint):
    problem = problems_of(config)["optimizer_config"]
    assert message in problem.message
    assert hint in problem.hint


def test_load_project_valid_optimizer_config_is_parsed(write_project):
    config = {
        "optimizer": "prodigy",
        "learning_rate": 1,
        "optimizer_config": "d_coef=2,use_bias_correction=true",
    }
    load_project(write_project(config))
    load_project(write_project({"optimizer_config": {"betas": [0.9, 0.95], "eps": "1e-7"}}))
