"""Scheduled sampling: some images reach their timestep by the model's own steps, so that it learns to mend what it does to itself.

An item with offset k is noised to timestep t + k, and denoised from there to t by the model as it stands, one timestep at a time and
without gradient. What the model is asked for stays what it was: the target at t of the original latents and noise (Bengio et al. 2015,
"Scheduled Sampling for Sequence Prediction with Recurrent Neural Networks"; Ren et al. 2024, "Multi-Step Denoising Scheduled Sampling").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.rng import choose, uniform

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents (b, C, H, W), timesteps (b,), items (b,)) -> the UNet's answer for these items of the batch, (b, C, H, W)."""

SOLVERS: Final = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
}
"""Diffusers' class of each `scheduled_sampling_sampler`."""

SCHEDULE: Final = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""What a solver takes over from the schedule of the training."""


@dataclass(frozen=True)
class Rollout:
    """One item of a batch that the model takes from one timestep down to another."""

    item: int
    source: int
    target: int


@dataclass(frozen=True)
class RolloutSampler:
    """Which images are rolled out, and from where: a pure function of (seed, batch, slot)."""

    num_train_timesteps: int
    max_offset: int
    probability: float = 1.0
    strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    start_step: int = 0
    ramp_steps: int = 0
    """Optimizer steps from `start_step` on in which the probability goes from `prob_start` to `prob_end`; 0: it is `probability`."""
    ramp_shape: Literal["linear", "cosine"] = "linear"
    prob_start: float = 0.0
    prob_end: float = 0.5

    def probability_at(self, step: int) -> float:
        """Probability that an image is rolled out in an optimizer step, counted from 0."""
        if not self.ramp_steps:
            return self.probability if step >= self.start_step else 0.0
        progress = min(1.0, max(0.0, (step - self.start_step) / self.ramp_steps))
        if self.ramp_shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.prob_start + (self.prob_end - self.prob_start) * progress

    def draw(
        self, timesteps: Sequence[int], step: int, seed: int, index: int, slots: Sequence[int]
    ) -> tuple[Rollout, ...]:
        """The rollouts in a batch of `timesteps`, whose images have `slots` in the global batch `index`; offsets of 0 are none."""
        probability = self.probability_at(step)
        rollouts = []
        for item, (timestep, slot) in enumerate(zip(timesteps, slots, strict=True)):
            if uniform(seed, "roll out", index, slot) >= probability:
                continue
            source = min(timestep + self._offset(seed, index, slot), self.num_train_timesteps - 1)
            if source > timestep:
                rollouts.append(Rollout(item, source, timestep))
        return tuple(rollouts)

    def _offset(self, seed: int, index: int, slot: int) -> int:
        if self.strategy == "uniform":
            return choose(self.max_offset + 1, seed, "rollout offset", index, slot)
        square = uniform(seed, "rollout offset", index, slot) ** 2
        return round((square if self.strategy == "biased_early" else 1 - square) * self.max_offset)


@dataclass(frozen=True)
class Solver:
    """A sampler of diffusers over the schedule of the training, visiting every timestep."""

    name: Literal["unipc", "euler", "dpm"]
    order: int
    schedule: dict[str, Any]

    def start(self, rollout: Rollout, latents: Tensor, noise: Tensor) -> "Descent":
        """A descent that begins with `latents` (1, C, H, W) and `noise` at the rollout's source."""
        scheduler_class = getattr(diffusers, SOLVERS[self.name])
        order = {} if self.name == "euler" else {"solver_order": self.order}
        scheduler = scheduler_class(**self.schedule, **order, timestep_spacing="trailing")
        scheduler.set_timesteps(self.schedule["num_train_timesteps"])  # T - 1, ..., 0
        first = self.schedule["num_train_timesteps"] - 1 - rollout.source
        scheduler.set_begin_index(first)
        sample = scheduler.add_noise(latents, noise, scheduler.timesteps[first : first + 1])
        return Descent(rollout, scheduler, sample)


class Descent:
    """One item on its way from its source to its target. Solvers keep what they saw last, so each item has one of its own."""

    def __init__(self, rollout: Rollout, scheduler: Any, sample: Tensor) -> None:
        self.rollout = rollout
        self.timestep = rollout.source
        self._scheduler = scheduler
        self._sample = sample  # as the solver has it: Euler's is x_0 + sigma eps

    @property
    def noisy_latents(self) -> Tensor:
        """x_t at `timestep`, as the UNet takes it: (1, C, H, W)."""
        return self._scheduler.scale_model_input(self._sample, self._when)

    def step(self, prediction: Tensor) -> None:
        """Go down one timestep by the UNet's answer to `noisy_latents`."""
        self._sample = self._scheduler.step(prediction.float(), self._when, self._sample).prev_sample
        self.timestep -= 1

    @property
    def _when(self) -> Tensor:
        timesteps: Tensor = self._scheduler.timesteps
        return timesteps[len(timesteps) - 1 - self.timestep]


@torch.no_grad()
def roll_out(
    noisy_latents: Tensor,
    latents: Tensor,
    noise: Tensor,
    rollouts: Sequence[Rollout],
    solver: Solver,
    predict: Predict,
) -> Tensor:
    """`noisy_latents` (B, C, H, W) with the items of `rollouts` replaced by where the model takes them; the others bit for bit as before.

    All items that are still on their way go through the model together, whatever their timesteps.
    """
    device = noisy_latents.device
    descents = [solver.start(each, latents[each.item, None], noise[each.item, None]) for each in rollouts]
    while going := [descent for descent in descents if descent.timestep > descent.rollout.target]:
        predictions = predict(
            torch.cat([descent.noisy_latents for descent in going]),
            torch.tensor([descent.timestep for descent in going], device=device),
            torch.tensor([descent.rollout.item for descent in going], device=device),
        )
        for descent, prediction in zip(going, predictions.split(1), strict=True):
            descent.step(prediction)
    rolled_out = noisy_latents.clone()
    for descent in descents:
        rolled_out[descent.rollout.item] = descent.noisy_latents[0]
    return rolled_out


def build_rollout_sampler(settings: TrainingSettings, num_train_timesteps: int) -> RolloutSampler | None:
    """The draw that the settings ask for; None when nothing is ever rolled out."""
    if not settings.scheduled_sampling_max_step_offset:
        return None
    return RolloutSampler(
        num_train_timesteps,
        max_offset=settings.scheduled_sampling_max_step_offset,
        probability=settings.scheduled_sampling_probability,
        strategy=settings.scheduled_sampling_strategy,
        start_step=settings.scheduled_sampling_start_step,
        ramp_steps=settings.scheduled_sampling_ramp_steps,
        ramp_shape=settings.scheduled_sampling_ramp_shape,
        prob_start=settings.scheduled_sampling_prob_start,
        prob_end=settings.scheduled_sampling_prob_end,
    )


def build_solver(settings: TrainingSettings, scheduler: DDPMScheduler) -> Solver:
    """The solver that the settings ask for, over the schedule of `scheduler`."""
    return Solver(
        settings.scheduled_sampling_sampler,
        settings.scheduled_sampling_order,
        {key: scheduler.config[key] for key in SCHEDULE},
    )
