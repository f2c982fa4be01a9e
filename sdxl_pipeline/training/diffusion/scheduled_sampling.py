"""Scheduled sampling: some images reach their timestep by the model's own denoising steps, so that it learns to correct its own errors.

An item with offset k is noised to timestep t + k and denoised from there to t by the current model, one timestep at a time and without
gradients. The target stays that of timestep t for the original latents and noise (Bengio et al. 2015, "Scheduled Sampling for Sequence
Prediction with Recurrent Neural Networks"; Ren et al. 2024, "Multi-Step Denoising Scheduled Sampling").
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import diffusers
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from sdxl_pipeline.config.schema.objective import ScheduledSamplingSettings
from sdxl_pipeline.training.rng import choose, uniform

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy latents (b, C, H, W), timesteps (b,), items (b,)) -> the UNet's output for these items of the batch, (b, C, H, W)."""

SOLVERS: Final = {
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm": "DPMSolverMultistepScheduler",
}
"""The diffusers class of each `scheduled_sampling_sampler`."""

SCHEDULE: Final = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
"""Config entries that a solver copies from the training schedule."""


@dataclass(frozen=True)
class Rollout:
    """One item of a batch that the model denoises from timestep `source` to `target`."""

    item: int
    source: int
    target: int


@dataclass(frozen=True)
class RolloutSampler:
    """Samples which images are rolled out, and from which timestep: a pure function of (seed, batch, slot)."""

    num_train_timesteps: int
    max_offset: int
    probability: float = 1.0
    strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    start_step: int = 0
    ramp_steps: int = 0
    """Optimizer steps, from `start_step` on, over which the probability goes from `prob_start` to `prob_end`; 0: always `probability`."""
    ramp_shape: Literal["linear", "cosine"] = "linear"
    prob_start: float = 0.0
    prob_end: float = 0.5

    def probability_at(self, step: int) -> float:
        """Return the probability that an image is rolled out in an optimizer step, counted from 0."""
        if not self.ramp_steps:
            return self.probability if step >= self.start_step else 0.0
        progress = min(1.0, max(0.0, (step - self.start_step) / self.ramp_steps))
        if self.ramp_shape == "cosine":
            progress = 0.5 - 0.5 * math.cos(math.pi * progress)
        return self.prob_start + (self.prob_end - self.prob_start) * progress

    def sample(
        self, timesteps: Sequence[int], step: int, seed: int, index: int, slots: Sequence[int]
    ) -> tuple[Rollout, ...]:
        """Return the rollouts of a batch of `timesteps`, whose images have `slots` in the global batch `index`; offsets of 0 are omitted."""
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
    """A diffusers scheduler over the training schedule that visits every timestep."""

    name: Literal["unipc", "euler", "dpm"]
    order: int
    schedule: dict[str, Any]

    def start(self, rollout: Rollout, latents: Tensor, noise: Tensor) -> "RolloutState":
        """Return the state of a rollout that starts from `latents` (1, C, H, W) and `noise` at its source timestep."""
        scheduler_class = getattr(diffusers, SOLVERS[self.name])
        order = {} if self.name == "euler" else {"solver_order": self.order}
        scheduler = scheduler_class(**self.schedule, **order, timestep_spacing="trailing")
        scheduler.set_timesteps(self.schedule["num_train_timesteps"])  # T - 1, ..., 0
        first = self.schedule["num_train_timesteps"] - 1 - rollout.source
        scheduler.set_begin_index(first)
        sample = scheduler.add_noise(latents, noise, scheduler.timesteps[first : first + 1])
        return RolloutState(rollout, scheduler, sample)


class RolloutState:
    """One item between its source and target timesteps. Multistep solvers keep history, so each item has its own scheduler."""

    def __init__(self, rollout: Rollout, scheduler: Any, sample: Tensor) -> None:
        self.rollout = rollout
        self.timestep = rollout.source
        self._scheduler = scheduler
        self._sample = sample  # in the solver's scaling: Euler's is x_0 + sigma eps

    @property
    def noisy_latents(self) -> Tensor:
        """Return x_t at `timestep` in the scaling of the UNet's input: (1, C, H, W)."""
        return self._scheduler.scale_model_input(self._sample, self._scheduler_timestep)

    def step(self, prediction: Tensor) -> None:
        """Denoise by one timestep with the UNet's output for `noisy_latents`."""
        self._sample = self._scheduler.step(
            prediction.float(), self._scheduler_timestep, self._sample
        ).prev_sample
        self.timestep -= 1

    @property
    def _scheduler_timestep(self) -> Tensor:
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
    """Return `noisy_latents` (B, C, H, W) with the items of `rollouts` rolled out by the model; the other items are unchanged, bit for bit.

    All active items share one forward pass per step, whatever their timesteps.
    """
    device = noisy_latents.device
    states = [solver.start(each, latents[each.item, None], noise[each.item, None]) for each in rollouts]
    while active := [state for state in states if state.timestep > state.rollout.target]:
        predictions = predict(
            torch.cat([state.noisy_latents for state in active]),
            torch.tensor([state.timestep for state in active], device=device),
            torch.tensor([state.rollout.item for state in active], device=device),
        )
        for state, prediction in zip(active, predictions.split(1), strict=True):
            state.step(prediction)
    rolled_out = noisy_latents.clone()
    for state in states:
        rolled_out[state.rollout.item] = state.noisy_latents[0]
    return rolled_out


def build_rollout_sampler(
    settings: ScheduledSamplingSettings, num_train_timesteps: int
) -> RolloutSampler | None:
    """Return the configured rollout sampler; None when rollouts are disabled."""
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


def build_solver(settings: ScheduledSamplingSettings, scheduler: DDPMScheduler) -> Solver:
    """Return the configured solver over the schedule of `scheduler`."""
    return Solver(
        settings.scheduled_sampling_sampler,
        settings.scheduled_sampling_order,
        {key: scheduler.config[key] for key in SCHEDULE},
    )
