"""Holds: a step of NaN or infinite loss or gradients changes nothing, whatever the optimizer; ten in a row end the run and name the images."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.optim.non_finite import (
    NON_FINITE_LIMIT,
    SkippedSteps,
    propagate_nonfinite,
    step_if_finite,
)
from sdxl_pipeline.training.optim.optimizers import build_optimizer


def frozen(value):
    """A state_dict with its tensors as lists, so that it can be compared with ==."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["adamw", "optimi-lion", "optimi-stableadamw"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_skipped_step_leaves_parameters_and_state_alone(name, value):
    def train(gradients):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = Accelerator(cpu=True).prepare(
            build_optimizer(TrainingSettings(optimizer=name), [parameter])
        )
        states = []
        for gradient in gradients:
            parameter.grad = torch.full((6,), gradient)
            step_if_finite(optimizer, torch.linalg.vector_norm(parameter.grad))
            states.append(frozen([parameter.detach().clone(), optimizer.state_dict()]))
        return states

    broken, sound = train([0.5, value, 0.25]), train([0.5, 0.25])
    assert broken[0] == broken[1] == sound[0]
    assert broken[2] == sound[1] != sound[0]


def test_an_infinite_loss_with_finite_gradients_is_seen_in_the_gradients():
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = torch.nn.functional.smooth_l1_loss(parameter, torch.tensor([0.0, float("inf")]))
    assert torch.autograd.grad(loss, parameter, retain_graph=True)[0].isfinite().all()
    propagate_nonfinite(loss).backward()
    assert not torch.linalg.vector_norm(parameter.grad).isfinite()


def test_a_finite_loss_and_its_gradients_keep_every_bit():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator))
    loss = (parameter**3).mean()
    expected = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    assert torch.equal(propagate_nonfinite(loss), loss)
    assert torch.equal(torch.autograd.grad(propagate_nonfinite(loss), parameter)[0], expected)


def draw(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        sample=SimpleNamespace(dataset_id="cats", path=f"{name}.png", key=name[0] * 64), occurrence=0
    )


def test_a_warning_names_each_image_once():
    said = SkippedSteps(100).skipped(3, float("nan"), [[draw("a"), draw("b")], [draw("a")]])
    assert "step 3 is skipped because its loss is nan" in said
    assert said.count("cats/a.png (key aaaaaaaaaaaa)") == said.count("cats/b.png (key bbbbbbbbbbbb)") == 1


def test_only_steps_in_a_row_end_the_run():
    skipped = SkippedSteps(100)
    for first, then in pairwise(range(0, 90, NON_FINITE_LIMIT)):
        for step in range(first + 1, then):
            skipped.skipped(step, 0.5, [])
        skipped.taken()
    for step in range(91, 90 + NON_FINITE_LIMIT):
        assert "its gradients are not finite" in skipped.skipped(step, 0.5, [])
    with pytest.raises(UserError, match="steps 91 to 100 were skipped"):
        skipped.skipped(90 + NON_FINITE_LIMIT, 0.5, [])
