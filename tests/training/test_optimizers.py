"""Optimizers and schedules by their names: their options reach them, and a saved and loaded one goes on as if nothing had been."""

import math
import sys

import pytest
import torch

from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.training.checkpoints import TrainingState, load_checkpoint, save_checkpoint
from sdxl_pipeline.training.optimizers import build_optimizer, build_schedule

NAMES = ["adamw", "optimi-adamw", "optimi-lion", "optimi-stableadamw"]


def settings_of(**values) -> TrainingSettings:
    return TrainingSettings(**{"max_train_steps": 20, "learning_rate": 0.01, **values})


def make_parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (5,)]]


def take_steps(optimizer, schedule, parameters, first, last) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_optimizer_goes_on_to_the_same_bits(name, tmp_path):
    if name != "adamw":
        pytest.importorskip("optimi", reason="needs the extra `optimizers`")
    settings = settings_of(optimizer=name, lr_scheduler="cosine", lr_warmup_steps=3)

    unbroken = make_parameters()
    optimizer = build_optimizer(settings, unbroken)
    schedule = build_schedule(settings, optimizer, 20)
    take_steps(optimizer, schedule, unbroken, 0, 7)
    state = TrainingState(7, 0, 0, {}, optimizer.state_dict(), schedule.state_dict(), None)
    place = save_checkpoint(tmp_path, "me", state, lambda folder: None)
    kept = [parameter.detach().clone() for parameter in unbroken]
    take_steps(optimizer, schedule, unbroken, 7, 12)

    resumed = make_parameters()
    with torch.no_grad():
        for parameter, value in zip(resumed, kept, strict=True):
            parameter.copy_(value)
    optimizer = build_optimizer(settings, resumed)
    schedule = build_schedule(settings, optimizer, 20)
    loaded = load_checkpoint(place)
    optimizer.load_state_dict(loaded.optimizer)
    schedule.load_state_dict(loaded.schedule)
    take_steps(optimizer, schedule, resumed, 7, 12)

    for one, other, start in zip(unbroken, resumed, kept, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


@pytest.mark.parametrize("name", NAMES)
def test_options_reach_the_optimizer(name):
    if name != "adamw":
        pytest.importorskip("optimi", reason="needs the extra `optimizers`")
    settings = settings_of(optimizer=name, optimizer_config="beta1=0.7,weight_decay=0.5")
    group = build_optimizer(settings, make_parameters()).param_groups[0]
    betas = group["betas"] if name == "adamw" else (group["beta1"], group["beta2"])
    assert betas == (0.7, 0.999 if name == "adamw" else 0.99)
    assert group["weight_decay"] == 0.5
    assert group["lr"] == 0.01


def test_adamw_is_adamw():
    """One step by hand (Loshchilov and Hutter 2019): decay, then the bias-corrected update, which is the sign at the first step."""
    (weight,) = parameters = [torch.nn.Parameter(torch.tensor([2.0, -1.0]))]
    optimizer = build_optimizer(settings_of(), parameters)
    weight.grad = torch.tensor([0.3, -4.0])
    optimizer.step()
    expected = torch.tensor([2.0, -1.0]) * (1 - 0.01 * 0.01) - 0.01 * torch.tensor([1.0, -1.0])
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-6)


def test_an_unknown_option_is_named_with_those_there_are():
    settings = settings_of(optimizer_config={"momentum": 0.9})
    with pytest.raises(
        StageError, match=r"'momentum', which 'adamw' does not take; it takes beta1, beta2, .*weight_decay"
    ):
        build_optimizer(settings, make_parameters())
    with pytest.raises(StageError, match="optimizer_config"):
        build_optimizer(settings_of(optimizer_config={"beta1": 1.5}), make_parameters())


def test_a_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimi", None)
    with pytest.raises(StageError, match=r"'optimi-lion'.*sdxl-pipeline\[optimizers\]"):
        build_optimizer(settings_of(optimizer="optimi-lion"), make_parameters())


def rates(**values) -> list[float]:
    settings = settings_of(learning_rate=1.0, **values)
    optimizer = build_optimizer(settings, make_parameters())
    schedule = build_schedule(settings, optimizer, 20)
    found = []
    for _ in range(20):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_schedules():
    assert rates(lr_scheduler="constant", lr_warmup_steps=4) == [1.0] * 20
    warm = [0.0, 0.25, 0.5, 0.75]
    assert rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4) == warm + [1.0] * 16
    cosine = [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates(lr_scheduler="cosine", lr_warmup_steps=4) == pytest.approx(warm + cosine)
