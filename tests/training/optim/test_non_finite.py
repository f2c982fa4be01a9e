"""Steps with NaN or infinite loss or gradients change nothing, for any optimizer; ten consecutive ones end the run and list the images."""

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


def comparable(value):
    """Return a state_dict with tensors as lists, for comparison with ==."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", ["adamw", "optimi-lion", "optimi-stableadamw"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_if_finite_non_finite_norm_leaves_parameters_and_state_unchanged(name, value):
    def train(gradients):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6))
        optimizer = Accelerator(cpu=True).prepare(
            build_optimizer(TrainingSettings(optimizer=name), [parameter])
        )
        states = []
        for gradient in gradients:
            parameter.grad = torch.full((6,), gradient)
            step_if_finite(optimizer, torch.linalg.vector_norm(parameter.grad))
            states.append(comparable([parameter.detach().clone(), optimizer.state_dict()]))
        return states

    with_skipped, without_skipped = train([0.5, value, 0.25]), train([0.5, 0.25])
    assert with_skipped[0] == with_skipped[1] == without_skipped[0]
    assert with_skipped[2] == without_skipped[1] != without_skipped[0]


def test_propagate_nonfinite_infinite_loss_gives_non_finite_gradients():
    parameter = torch.nn.Parameter(torch.ones(2))
    loss = torch.nn.functional.smooth_l1_loss(parameter, torch.tensor([0.0, float("inf")]))
    assert torch.autograd.grad(loss, parameter, retain_graph=True)[0].isfinite().all()
    propagate_nonfinite(loss).backward()
    assert not torch.linalg.vector_norm(parameter.grad).isfinite()


def test_propagate_nonfinite_finite_loss_and_gradients_are_unchanged():
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(50, generator=generator))
    loss = (parameter**3).mean()
    expected = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    assert torch.equal(propagate_nonfinite(loss), loss)
    assert torch.equal(torch.autograd.grad(propagate_nonfinite(loss), parameter)[0], expected)


def sample_ref(name: str) -> SimpleNamespace:
    return SimpleNamespace(
        sample=SimpleNamespace(dataset_id="cats", path=f"{name}.png", key=name[0] * 64), occurrence=0
    )


def test_skipped_steps_warning_lists_each_image_once():
    warning = SkippedSteps(100).skipped(
        3, float("nan"), [[sample_ref("a"), sample_ref("b")], [sample_ref("a")]]
    )
    assert "step 3 is skipped because its loss is nan" in warning
    assert (
        warning.count("cats/a.png (key aaaaaaaaaaaa)") == warning.count("cats/b.png (key bbbbbbbbbbbb)") == 1
    )


def test_skipped_steps_only_consecutive_ones_raise():
    skipped = SkippedSteps(100)
    for start, end in pairwise(range(0, 90, NON_FINITE_LIMIT)):
        for step in range(start + 1, end):
            skipped.skipped(step, 0.5, [])
        skipped.applied()
    for step in range(91, 90 + NON_FINITE_LIMIT):
        assert "its gradients are not finite" in skipped.skipped(step, 0.5, [])
    with pytest.raises(UserError, match="steps 91 to 100 were skipped"):
        skipped.skipped(90 + NON_FINITE_LIMIT, 0.5, [])
