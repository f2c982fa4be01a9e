"""Warm start of an optimizer: what it has learned is preserved, its options are those of the new run, and incompatible state is rejected."""

import pytest
import torch

from sdxl_pipeline.config.optimizer_registry import OPTIMIZERS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.checkpoint.checkpoints import TrainingState
from sdxl_pipeline.training.checkpoint.optimizer_state import flatten_optimizer
from sdxl_pipeline.training.checkpoint.warm_start import optimizer_fits, rebase_state
from sdxl_pipeline.training.optim.lr_schedules import build_schedule
from sdxl_pipeline.training.optim.optimizers import build_optimizer, cast_parameters
from sdxl_pipeline.training.trainer_setup import trained_dtype

SHAPES = {"matrix": (32, 128), "vector": (5,)}


def settings_of(name: str, config: str, **values: object) -> TrainingSettings:
    pytest.importorskip(OPTIMIZERS[name].package, reason="needs the extra `optimizers`")
    rate = 1.0 if name == "prodigy" else 0.01
    values = {"learning_rate": rate, "lr_scheduler": "constant", "max_train_steps": 20, **values}
    return TrainingSettings(optimizer=name, optimizer_config=config, **values)


def build(settings: TrainingSettings):
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES.values()]
    cast_parameters(parameters, trained_dtype(settings), settings.gradient_precision)
    optimizer = build_optimizer(settings, parameters)
    if settings.is_schedule_free:
        optimizer.train()
    return optimizer, build_schedule(settings, optimizer, 20), parameters


def take_steps(optimizer, schedule, parameters, steps: int = 3) -> None:
    for _ in range(steps):
        torch.manual_seed(0)
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        schedule.step()


def state_after(settings: TrainingSettings, steps: int = 3) -> TrainingState:
    optimizer, schedule, parameters = build(settings)
    take_steps(optimizer, schedule, parameters, steps)
    named = {name: value.detach() for name, value in zip(SHAPES, parameters, strict=True)}
    return TrainingState(steps, 0, 0, named, optimizer.state_dict(), schedule.state_dict(), None)


OPTIONS = [
    (
        "adamw",
        "beta1=0.8,weight_decay=0.1,eps=1e-3",
        {"betas": (0.8, 0.999), "weight_decay": 0.1, "eps": 1e-3},
    ),
    ("optimi-lion", "beta1=0.5,beta2=0.6", {"beta1": 0.5, "beta2": 0.6}),
    ("optimi-adan", "beta3=0.5", {"beta1": 0.98, "beta3": 0.5}),
    ("optimi-ranger", "k=3", {"k": 3}),
    ("optimi-stableadamw", "beta1=0.5,weight_decay=0.3", {"beta1": 0.5, "weight_decay": 0.3}),
    ("prodigy", "d_coef=2,beta1=0.5", {"d_coef": 2, "betas": (0.5, 0.99)}),
    ("adamw_schedulefree", "beta1=0.5", {"betas": (0.5, 0.999)}),
    ("ao-adamw8bit", "weight_decay=0.3", {"weight_decay": 0.3}),
    ("bnb-lion", "beta1=0.5", {"betas": (0.5, 0.99)}),
    ("torch-nadam", "momentum_decay=0.1", {"momentum_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "config", "expected"), OPTIONS, ids=[name for name, *_ in OPTIONS])
def test_rebase_state_uses_new_options_and_preserves_learned_state(name, config, expected):
    state = state_after(settings_of(name, ""))
    rate = 0.5 if name == "prodigy" else 0.003
    settings = settings_of(name, config, learning_rate=rate)
    assert optimizer_fits(state, settings, torch.float32, "cpu")
    optimizer, schedule, parameters = build(settings)
    rebased = rebase_state(state, settings, optimizer, schedule)
    optimizer.load_state_dict(rebased.optimizer)
    schedule.load_state_dict(rebased.schedule)
    (group,), (before,) = optimizer.param_groups, state.optimizer["param_groups"]
    assert {key: group[key] for key in expected} == expected
    assert (float(group["lr"]), group["initial_lr"]) == (pytest.approx(rate), pytest.approx(rate))
    learned = OPTIMIZERS[name].state_group_keys & before.keys()
    assert {key: group[key] for key in learned} == {key: before[key] for key in learned}
    tensors, expected_tensors = (
        flatten_optimizer(each)[0] for each in (optimizer.state_dict(), state.optimizer)
    )
    assert tensors.keys() == expected_tensors.keys()
    assert all(
        torch.equal(tensors[key], tensor) for key, tensor in expected_tensors.items() if "lr" not in key
    )
    take_steps(optimizer, schedule, parameters)


@pytest.mark.parametrize(
    ("name", "source_config", "run_config"),
    [
        ("adamw", "", "amsgrad=true"),
        ("adamw", "amsgrad=true", ""),
        ("optimi-sgd", "", "momentum=0.9"),
        ("torch-sgd", "momentum=0.9", ""),
        ("torch-rmsprop", "", "momentum=0.9"),
        ("adafactor", "", "beta1=0.9"),
        ("bnb-adamw8bit", "", "min_8bit_size=100000"),
    ],
)
def test_optimizer_fits_with_another_state_layout_returns_false(name, source_config, run_config):
    assert optimizer_fits(
        state_after(settings_of(name, source_config)), settings_of(name, source_config), torch.float32, "cpu"
    )
    assert not optimizer_fits(
        state_after(settings_of(name, source_config)), settings_of(name, run_config), torch.float32, "cpu"
    )


def test_rebase_state_includes_options_set_by_the_first_step():
    """torch-optimi enables Kahan summation for bf16 weights in the first step; without it the compensation is lost."""
    settings = settings_of("optimi-adamw", "", model_type="full", mixed_precision="bf16")
    state = state_after(settings)
    optimizer, schedule, parameters = build(settings)
    optimizer.load_state_dict(rebase_state(state, settings, optimizer, schedule).optimizer)
    assert optimizer.param_groups[0]["kahan_sum"]
    take_steps(optimizer, schedule, parameters)


def test_rebase_state_without_optimizer_state_starts_fresh():
    settings = settings_of("optimi-adamw", "beta1=0.5")
    state = TrainingState(3, 0, 0, {}, {}, {}, None)
    optimizer, schedule, parameters = build(settings)
    rebased = rebase_state(state, settings, optimizer, schedule)
    assert not rebased.optimizer["state"]
    optimizer.load_state_dict(rebased.optimizer)
    assert optimizer.param_groups[0]["beta1"] == 0.5
    take_steps(optimizer, schedule, parameters)
    assert int(optimizer.param_groups[0]["step"]) == 3
