"""Every optimizer by name: it comes from its library and learns, its options are applied, and it resumes exactly from a saved state."""

import copy
import importlib
import inspect
import sys
import typing

import pytest
import torch

from sdxl_pipeline.config.optimizer_registry import OPTIMIZERS
from sdxl_pipeline.config.schema.optimization import OptimizerName
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from sdxl_pipeline.training.optim.lr_schedules import build_schedule
from sdxl_pipeline.training.optim.optimizers import (
    build_optimizer,
    cast_parameters,
    current_lr,
    effective_learning_rate,
)
from sdxl_pipeline.training.trainer_setup import trained_dtype

NAMES = typing.get_args(OptimizerName)
TARGET = 0.5


def settings_of(**values) -> TrainingSettings:
    rate = 1.0 if values.get("optimizer") == "prodigy" else 0.01
    return TrainingSettings(**{"max_train_steps": 20, "learning_rate": rate, **values})


def make_parameters() -> list[torch.nn.Parameter]:
    """Return a parameter large enough (4096 values) to be quantized, and a small one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(32, 128), (5,)]]


def build(settings, parameters):
    pytest.importorskip(OPTIMIZERS[settings.optimizer].package, reason="needs the extra `optimizers`")
    cast_parameters(parameters, trained_dtype(settings), settings.gradient_precision)
    optimizer = build_optimizer(settings, parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer, build_schedule(settings, optimizer, 20)


def take_steps(optimizer, schedule, parameters, first, last) -> None:
    """Take steps towards `TARGET`, with noise that is a function of the step."""
    for step in range(first, last):
        torch.manual_seed(1000 + step)  # the trainer seeds the global generator at each step
        for parameter in parameters:
            noise = torch.randn(parameter.shape).to(parameter.dtype)
            parameter.grad = (parameter.detach() - TARGET) + 0.1 * noise
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def distance(parameters) -> float:
    return sum((parameter.detach().float() - TARGET).square().sum().item() for parameter in parameters)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_resumed_from_a_checkpoint_repeats_the_same_steps(name, tmp_path):
    scheduled = {} if "schedulefree" in name else {"lr_scheduler": "cosine"}
    precision = {"mixed_precision": "bf16"} if name == "adamw_bf16" else {}
    settings = settings_of(optimizer=name, lr_warmup_steps=3, **scheduled, **precision)

    uninterrupted = make_parameters()
    optimizer, schedule = build(settings, uninterrupted)
    before = distance(uninterrupted)
    take_steps(optimizer, schedule, uninterrupted, 0, 7)
    state = TrainingState(7, 0, 0, {}, optimizer.state_dict(), schedule.state_dict(), None)
    checkpoint = save_checkpoint(tmp_path, "me", state, lambda folder: folder)
    saved = [parameter.detach().clone() for parameter in uninterrupted]
    take_steps(optimizer, schedule, uninterrupted, 7, 12)
    assert distance(uninterrupted) < before

    resumed = make_parameters()
    optimizer, schedule = build(settings, resumed)
    with torch.no_grad():
        for parameter, value in zip(resumed, saved, strict=True):
            parameter.copy_(value)
    loaded = load_checkpoint(checkpoint)
    optimizer.load_state_dict(loaded.optimizer)
    schedule.load_state_dict(loaded.schedule)
    take_steps(optimizer, schedule, resumed, 7, 12)

    for one, other, start in zip(uninterrupted, resumed, saved, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)
    assert {file.suffix for file in checkpoint.iterdir()} == {".safetensors", ".json"}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_group_values_changed_by_steps_are_registered_as_learnt(name):
    precision = {"mixed_precision": "bf16"} if name == "adamw_bf16" else {}
    parameters = make_parameters()
    optimizer, schedule = build(settings_of(optimizer=name, **precision), parameters)
    (group,) = optimizer.param_groups
    take_steps(optimizer, schedule, parameters, 0, 1)
    after_first_step = copy.deepcopy({key: value for key, value in group.items() if key != "params"})
    take_steps(optimizer, schedule, parameters, 1, 8)
    changed = {key for key, value in after_first_step.items() if group[key] != value} - {"lr"}
    assert changed <= OPTIMIZERS[name].state_group_keys
    assert "step" not in group or "step" in changed


@pytest.mark.parametrize(
    ("name", "betas"),
    [
        ("adamw", (0.7, 0.999)),
        ("ao-adamw8bit", (0.7, 0.999)),
        ("bnb-lion8bit", (0.7, 0.99)),
        ("prodigy", (0.7, 0.99)),
        ("adamw_schedulefree", (0.7, 0.999)),
    ],
)
def test_optimizer_config_options_are_applied(name, betas):
    group = build(
        settings_of(optimizer=name, optimizer_config="beta1=0.7,weight_decay=0.5"), make_parameters()
    )[0].param_groups[0]
    assert tuple(group["betas"]) == betas
    assert group["weight_decay"] == 0.5


def test_optimizer_config_betas_are_applied_to_optimi():
    config = {"betas": [0.9, 0.8, 0.7], "weight_decay": 0.5}
    group = build(settings_of(optimizer="optimi-adan", optimizer_config=config), make_parameters())[0]
    assert [group.param_groups[0][f"beta{index}"] for index in (1, 2, 3)] == [0.9, 0.8, 0.7]
    group = build(settings_of(optimizer="optimi-lion", optimizer_config="beta1=0.7"), make_parameters())[0]
    assert (group.param_groups[0]["beta1"], group.param_groups[0]["beta2"]) == (0.7, 0.99)


def test_optimizer_config_numbers_are_converted_to_the_option_type():
    optimizer, _ = build(settings_of(optimizer="optimi-ranger", optimizer_config="k=3"), make_parameters())
    assert optimizer.param_groups[0]["k"] == 3
    assert isinstance(optimizer.param_groups[0]["k"], int)
    with pytest.raises(UserError, match=r"amsgrad = 3\.0; write amsgrad=true or amsgrad=false"):
        build(settings_of(optimizer_config="amsgrad=3"), make_parameters())


def test_adamw_step_equals_the_published_formula():
    """Compute one step by hand (Loshchilov and Hutter 2019): decay, then the bias-corrected update, the sign at the first step."""
    (weight,) = parameters = [torch.nn.Parameter(torch.tensor([2.0, -1.0]))]
    optimizer = build_optimizer(settings_of(), parameters)
    assert optimizer.param_groups[0]["fused"]
    weight.grad = torch.tensor([0.3, -4.0])
    optimizer.step()
    expected = torch.tensor([2.0, -1.0]) * (1 - 0.01 * 0.01) - 0.01 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)


def test_adamw_bf16_stochastic_rounding_preserves_small_updates():
    """Take 1000 steps of -1e-4 from 1.0, where bf16 values are 2^-8 apart: rounding to nearest would never change the weight."""
    pytest.importorskip("torchao", reason="needs the extra `optimizers`")
    parameters = [torch.nn.Parameter(torch.ones(1000))]
    settings = settings_of(
        optimizer="adamw_bf16", learning_rate=1e-4, optimizer_config="weight_decay=0", mixed_precision="bf16"
    )
    optimizer, _ = build(settings, parameters)
    assert parameters[0].dtype == torch.bfloat16
    assert torch.equal(torch.tensor(1.0 - 1e-4).bfloat16(), torch.tensor(1.0).bfloat16())
    for _ in range(1000):
        parameters[0].grad = torch.ones(1000, dtype=torch.bfloat16)
        optimizer.step()
    drift = 1 - parameters[0].detach().float()
    assert drift.mean().item() == pytest.approx(0.1, rel=0.02)
    assert drift.std() > 0.005  # each value is rounded independently


def test_cast_parameters_gradient_precision_fp32_sums_gradients_in_fp32():
    for precision, exceeds_one in (("unmodified", False), ("fp32", True)):
        parameters = [torch.nn.Parameter(torch.ones(1))]
        cast_parameters(parameters, torch.bfloat16, precision)
        (parameters[0].float() * 1.0).sum().backward()
        (parameters[0].float() * 1e-3).sum().backward()
        assert bool(parameters[0].grad > 1) is exceeds_one


def test_build_optimizer_gradient_precision_fp32_on_several_processes_raises():
    settings, parameters = settings_of(gradient_precision="fp32"), make_parameters()
    cast_parameters(parameters, torch.bfloat16, "fp32")
    with pytest.raises(UserError, match='write "unmodified"'):
        build_optimizer(settings, parameters, num_processes=2)
    assert build_optimizer(settings, make_parameters(), num_processes=2)


def test_schedule_free_eval_mode_applies_the_average():
    """x = (1 - 1/k) x + z/k over the steps, and the trained y = 0.9 x + 0.1 z (Defazio et al. 2024)."""
    pytest.importorskip("schedulefree", reason="needs the extra `optimizers`")
    parameters = make_parameters()
    optimizer, schedule = build(settings_of(optimizer="adamw_schedulefree"), parameters)
    averaged = parameters[0].detach().clone()
    for step in range(5):
        take_steps(optimizer, schedule, parameters, step, step + 1)
        averaged = averaged.lerp(optimizer.state[parameters[0]]["z"], 1 / (step + 1))
    trained = parameters[0].detach().clone()
    torch.testing.assert_close(trained, averaged.lerp(optimizer.state[parameters[0]]["z"], 0.1))
    optimizer.eval()
    torch.testing.assert_close(parameters[0].detach(), averaged)


def test_current_lr_equals_the_learning_rate_of_the_step():
    for name, config in (("prodigy", "d0=1e-3"), ("adamw_schedulefree", "")):
        optimizer, schedule = build(
            settings_of(optimizer=name, optimizer_config=config, lr_warmup_steps=10), make_parameters()
        )
        take_steps(optimizer, schedule, make_parameters(), 0, 1)
        group = optimizer.param_groups[0]
        expected = group["d"] * 1.0 if name == "prodigy" else 0.01 / 10
        assert current_lr(optimizer, 1.0) == pytest.approx(expected)
    assert current_lr(build_optimizer(settings_of(), make_parameters()), 0.3) == 0.3


def test_effective_learning_rate_scales_with_the_batch_size():
    values = {"train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert effective_learning_rate(settings_of(**values), 2) == 0.01
    assert effective_learning_rate(settings_of(lr_scale=True, **values), 2) == pytest.approx(0.12)
    scaled = settings_of(lr_scale=True, lr_scale_sqrt=True, **values)
    assert effective_learning_rate(scaled, 2) == pytest.approx(0.01 * 12**0.5)
    assert build_optimizer(scaled, make_parameters(), 2).param_groups[0]["lr"] == pytest.approx(
        0.01 * 12**0.5
    )


def test_build_optimizer_unknown_option_raises_with_the_valid_ones():
    settings = settings_of(optimizer_config={"momentum": 0.9})
    with pytest.raises(
        UserError,
        match=r"'momentum', which 'adamw' does not accept; adamw accepts beta1, beta2, .*weight_decay",
    ):
        build_optimizer(settings, make_parameters())
    with pytest.raises(UserError, match="optimizer_config"):
        build_optimizer(settings_of(optimizer_config={"beta1": 1.5}), make_parameters())
    with pytest.raises(UserError, match="'warmup_steps', which 'adamw_schedulefree'"):
        build(
            settings_of(optimizer="adamw_schedulefree", optimizer_config="warmup_steps=3"), make_parameters()
        )


def test_build_optimizer_conflicting_options_raise():
    with pytest.raises(UserError, match=r"optimizer_config .*cannot both be true"):
        build_optimizer(settings_of(optimizer_config="fused=true,foreach=true"), make_parameters())
    for option in ("differentiable", "capturable"):
        with pytest.raises(UserError, match=f"'{option}', which 'adamw' does not accept"):
            build_optimizer(settings_of(optimizer_config=f"{option}=true"), make_parameters())
    (group,) = build_optimizer(settings_of(optimizer_config="foreach=true"), make_parameters()).param_groups
    assert group["foreach"]
    assert not group["fused"]


def test_torch_adamw_equals_adamw():
    adamw, torch_adamw = (
        build_optimizer(settings_of(optimizer=name), make_parameters()) for name in ("adamw", "torch-adamw")
    )
    assert type(adamw) is type(torch_adamw) is torch.optim.AdamW
    for group, other in zip(adamw.param_groups, torch_adamw.param_groups, strict=True):
        assert {**group, "params": None} == {**other, "params": None}


@pytest.mark.parametrize(
    ("name", "module"),
    [("optimi-lion", "optimi"), ("ao-adamw4bit", "torchao.optim"), ("bnb-adamw", "bitsandbytes.optim")],
)
def test_build_optimizer_missing_package_raises_with_the_extra(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"'{name}'.*sdxl-pipeline\[optimizers\]"):
        build_optimizer(settings_of(optimizer=name), make_parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_registered_options_equal_those_of_the_class(name):
    spec = OPTIMIZERS[name]
    signature = inspect.signature(getattr(importlib.import_module(spec.module), spec.class_name)).parameters
    accepted = {
        key: each.default for key, each in signature.items() if key not in {"params", "lr"} | spec.reserved
    }
    assert set(spec.options) == set(accepted)
    assert set(spec.defaults) <= set(accepted) | spec.reserved
    numbers = (int, float)
    for key, default in accepted.items():
        registered = spec.options[key]
        if isinstance(default, bool) or not isinstance(default, numbers):
            assert type(registered) is type(default), key
        else:
            assert isinstance(registered, numbers), key
        if isinstance(default, tuple):
            assert len(registered) == len(default), key
