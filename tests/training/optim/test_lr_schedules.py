"""Learning-rate schedules equal those of diffusers where these exist, and the published formulas otherwise."""

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


def make_sgd(rate: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates_of(schedule, steps: int = STEPS) -> list[float]:
    values = []
    for _ in range(steps):
        assert schedule.optimizer.param_groups[0]["lr"] == schedule.get_last_lr()[0]
        values.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return values


def actual_rates(steps: int = STEPS, **values) -> list[float]:
    return rates_of(build_schedule(settings_of(**values), make_sgd(), STEPS), steps)


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedule_common_shapes_equal_diffusers(name, warmup):
    # SimpleTuner reads a constant rate with a warm-up as constant_with_warmup
    diffusers_name = "constant_with_warmup" if name == "constant" and warmup else name
    expected = get_scheduler(diffusers_name, make_sgd(), num_warmup_steps=warmup, num_training_steps=STEPS)
    actual = actual_rates(lr_scheduler=name, lr_warmup_steps=warmup, steps=STEPS + 1)
    assert actual == pytest.approx(rates_of(expected, STEPS + 1), rel=1e-15, abs=0)


def test_schedule_cosine_with_restarts_equals_diffusers():
    expected = get_scheduler(
        "cosine_with_restarts", make_sgd(), num_warmup_steps=2, num_training_steps=STEPS, num_cycles=3
    )
    actual = actual_rates(lr_scheduler="cosine_with_restarts", lr_warmup_steps=2, lr_num_cycles=3)
    assert actual == pytest.approx(rates_of(expected), abs=1e-12)
    assert sum(later > earlier for earlier, later in itertools.pairwise(actual[2:])) == 2


def test_schedule_polynomial_equals_diffusers():
    expected = get_polynomial_decay_schedule_with_warmup(make_sgd(), 4, STEPS, lr_end=0.01, power=0.8)
    actual = actual_rates(lr_scheduler="polynomial", lr_warmup_steps=4, lr_end=0.01, steps=STEPS + 3)
    assert actual == pytest.approx(rates_of(expected, STEPS + 3))
    assert actual[-1] == pytest.approx(0.01)
    assert settings_of(lr_scheduler="polynomial").effective_lr_end == 4e-7  # SimpleTuner's default


def test_schedule_sine_oscillates_between_peak_and_lr_end():
    actual = actual_rates(lr_scheduler="sine", lr_warmup_steps=5, lr_end=0.1)
    assert actual == pytest.approx(
        [0.1 + 0.4 * (0.5 + 0.5 * math.sin(math.pi * step / 5)) for step in range(STEPS)]
    )
    assert (actual[0], actual[10]) == pytest.approx((0.3, 0.3))


def test_schedule_cosine_ends_at_lr_end():
    actual = actual_rates(lr_scheduler="cosine", lr_end=0.1, steps=STEPS + 1)
    assert (actual[0], actual[-1]) == (0.5, pytest.approx(0.1))


def test_schedule_longest_warmup_reaches_the_peak_in_the_last_step():
    longest = settings_of(lr_scheduler="cosine").longest_warmup(STEPS)
    last = [
        actual_rates(lr_scheduler="cosine", lr_warmup_steps=warmup)[-1] for warmup in (longest, longest + 1)
    ]
    assert last == [0.5, pytest.approx(0.5 * (STEPS - 1) / STEPS)]


def test_schedule_of_schedule_free_optimizer_is_constant():
    schedule = build_schedule(
        settings_of(optimizer="adamw_schedulefree", lr_warmup_steps=7), make_sgd(), STEPS
    )
    assert rates_of(schedule) == [0.5] * STEPS


def test_schedule_tensor_learning_rate_is_updated_and_saved_as_a_number():
    """torchao's optimizers store their learning rate in a float32 tensor."""
    learning_rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    schedule = build_schedule(settings_of(lr_scheduler="cosine"), optimizer, STEPS)
    optimizer.step()
    schedule.step()
    saved = json.loads(json.dumps(schedule.state_dict()))
    assert optimizer.param_groups[0]["lr"] is learning_rate
    assert float(learning_rate) == pytest.approx(schedule.get_last_lr()[0])
    resumed_optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(0.1))
    resumed = build_schedule(settings_of(lr_scheduler="cosine"), resumed_optimizer, STEPS)
    resumed.load_state_dict(saved)
    for each in (optimizer, resumed_optimizer):
        each.step()
    schedule.step()
    resumed.step()
    assert torch.equal(resumed_optimizer.param_groups[0]["lr"], learning_rate)
