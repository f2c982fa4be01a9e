"""Holds the shapes of the learning rate: diffusers' own where it has them, by the published formula where it has none."""

import itertools
import json
import math

import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.optim.lr_schedules import build_schedule

STEPS = 20


def settings_of(**values) -> TrainingSettings:
    return TrainingSettings(**{"max_train_steps": STEPS, "learning_rate": 0.5, **values})


def sgd(rate: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(schedule, steps: int = STEPS) -> list[float]:
    found = []
    for _ in range(steps):
        assert schedule.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def ours(steps: int = STEPS, **values) -> list[float]:
    return rates(build_schedule(settings_of(**values), sgd(), STEPS), steps)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_the_common_ones_are_those_of_diffusers(name, warmup):
    # a constant rate with a warm-up is what the reference takes for the schedule of that name
    known = "constant_with_warmup" if name == "constant" and warmup else name
    theirs = get_scheduler(known, sgd(), num_warmup_steps=warmup, num_training_steps=STEPS)
    mine = ours(lr_scheduler=name, lr_warmup_steps=warmup, steps=STEPS + 1)
    assert mine == pytest.approx(rates(theirs, STEPS + 1), rel=1e-15, abs=0)


def test_restarts_are_those_of_diffusers():
    theirs = get_scheduler(
        "cosine_with_restarts", sgd(), num_warmup_steps=2, num_training_steps=STEPS, num_cycles=3
    )
    mine = ours(lr_scheduler="cosine_with_restarts", lr_warmup_steps=2, lr_num_cycles=3)
    assert mine == pytest.approx(rates(theirs), abs=1e-12)
    assert sum(later > earlier for earlier, later in itertools.pairwise(mine[2:])) == 2


def test_polynomial_is_that_of_diffusers():
    theirs = get_polynomial_decay_schedule_with_warmup(sgd(), 4, STEPS, lr_end=0.01, power=0.8)
    mine = ours(lr_scheduler="polynomial", lr_warmup_steps=4, lr_end=0.01, steps=STEPS + 3)
    assert mine == pytest.approx(rates(theirs, STEPS + 3))
    assert mine[-1] == pytest.approx(0.01)
    assert settings_of(lr_scheduler="polynomial").effective_lr_end == 4e-7  # SimpleTuner's default


def test_sine_swings_between_the_rate_and_its_end():
    mine = ours(lr_scheduler="sine", lr_warmup_steps=5, lr_end=0.1)
    assert mine == pytest.approx(
        [0.1 + 0.4 * (0.5 + 0.5 * math.sin(math.pi * step / 5)) for step in range(STEPS)]
    )
    assert (mine[0], mine[10]) == pytest.approx((0.3, 0.3))


def test_cosine_ends_where_it_is_told():
    mine = ours(lr_scheduler="cosine", lr_end=0.1, steps=STEPS + 1)
    assert (mine[0], mine[-1]) == (0.5, pytest.approx(0.1))


def test_the_longest_warm_up_reaches_the_peak_in_the_last_step():
    longest = settings_of(lr_scheduler="cosine").longest_warmup(STEPS)
    last = [ours(lr_scheduler="cosine", lr_warmup_steps=warmup)[-1] for warmup in (longest, longest + 1)]
    assert last == [0.5, pytest.approx(0.5 * (STEPS - 1) / STEPS)]


def test_a_schedule_free_optimizer_has_a_constant_rate():
    schedule = build_schedule(settings_of(optimizer="adamw_schedulefree", lr_warmup_steps=7), sgd(), STEPS)
    assert rates(schedule) == [0.5] * STEPS


def test_a_tensor_for_a_rate_is_followed_and_saved_as_a_number():
    """torchao's optimizers keep their rate in a float32 tensor."""
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    schedule = build_schedule(settings_of(lr_scheduler="cosine"), optimizer, STEPS)
    optimizer.step()
    schedule.step()
    kept = json.loads(json.dumps(schedule.state_dict()))
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(schedule.get_last_lr()[0])
    again = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    resumed = build_schedule(settings_of(lr_scheduler="cosine"), again, STEPS)
    resumed.load_state_dict(kept)
    for each in (optimizer, again):
        each.step()
    schedule.step()
    resumed.step()
    assert torch.equal(again.param_groups[0]["lr"], rate)
