"""The forward process of a batch: noise, timesteps, and which items are rolled out to their timestep by the model itself.

Everything is a pure function of (seed, batch, slot), computed on the CPU, so that it is the same on every device and for any number of
processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdxl_pipeline.config.schema.objective import NoiseSettings, ScheduledSamplingSettings
from sdxl_pipeline.training.diffusion.scheduled_sampling import Rollout, RolloutSampler, build_rollout_sampler
from sdxl_pipeline.training.rng import choose, derive_seed, uniform


@dataclass(frozen=True)
class TimestepSampler:
    """Samples the timestep of each slot of a global batch: uniformly, with a bias, or stratified over the batch."""

    num_train_timesteps: int
    biased_range: range | None = None
    """The timesteps that are `multiplier` times as likely as each of the others."""
    multiplier: float = 1.0
    segmented: bool = False
    """Split the distribution into as many equally likely segments as a global batch has slots, and sample one timestep from each."""

    def sample(self, seed: int, index: int, slot: int, slots: int) -> int:
        """Return the timestep of `slot` in the global batch `index` of `slots` images."""
        if self.biased_range is None and not self.segmented:
            generator = _generator(seed, "timestep", index, slot)
            return int(torch.randint(self.num_train_timesteps, (1,), generator=generator))
        quantile = uniform(seed, "timestep", index, slot)
        if self.segmented:
            # rotated at each batch, so that no slot, and so no process, always trains the same part of the schedule
            segment = (slot + choose(slots, seed, "segment", index)) % slots
            quantile = (segment + quantile) / slots
        return int(np.searchsorted(self._cumulative, quantile, side="right"))

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Probability that the timestep is at most t, (T,) float64; the last is 1."""
        weights = np.ones(self.num_train_timesteps)
        if self.biased_range is not None:
            weights[self.biased_range.start : self.biased_range.stop] = self.multiplier
        cumulative = np.cumsum(weights)
        return cumulative / cumulative[-1]


def build_timestep_sampler(settings: NoiseSettings, num_train_timesteps: int) -> TimestepSampler:
    """Return the configured timestep sampler."""
    return TimestepSampler(
        num_train_timesteps,
        settings.favoured_timesteps(num_train_timesteps),
        settings.timestep_bias_multiplier,
        segmented=not settings.disable_segmented_timestep_sampling,
    )


@dataclass(frozen=True)
class NoiseSampler:
    """Samples the noise of each slot of a global batch, with offset noise and input perturbation if configured."""

    offset: float = 0.0
    """Standard deviation of additional noise that is constant over a channel (Guttenberg 2023, "Diffusion with Offset Noise")."""
    offset_probability: float = 1.0
    perturbation: float = 0.0
    """Standard deviation of noise added to the UNet's input but not to its target (Ning et al. 2023, "Input Perturbation Reduces
    Exposure Bias in Diffusion Models")."""
    perturbation_steps: int = 0
    """Optimizer steps over which the perturbation decays linearly to 0; 0 keeps it constant."""

    def noise(self, shape: Sequence[int], seed: int, index: int, slot: int) -> Tensor:
        """Return eps, the noise of the target: float32 of `shape` (C, H, W)."""
        noise = torch.randn(*shape, generator=_generator(seed, "noise", index, slot))
        if self.offset and uniform(seed, "offset this one", index, slot) < self.offset_probability:
            generator = _generator(seed, "noise offset", index, slot)
            noise += self.offset * torch.randn(shape[0], 1, 1, generator=generator)
        return noise

    def perturbation_at(self, step: int) -> float:
        """Return the standard deviation of the perturbation in an optimizer step, counted from 0."""
        if not self.perturbation_steps:
            return self.perturbation
        return self.perturbation * max(0.0, 1 - step / self.perturbation_steps)

    def perturbed(self, noise: Tensor, step: int, seed: int, index: int, slot: int) -> Tensor:
        """Return `noise` (C, H, W) with the input perturbation of the slot."""
        generator = _generator(seed, "input perturbation", index, slot)
        return noise + self.perturbation_at(step) * torch.randn(noise.shape, generator=generator)


def build_noise_sampler(settings: NoiseSettings) -> NoiseSampler:
    """Return the configured noise sampler."""
    return NoiseSampler(
        offset=settings.noise_offset if settings.offset_noise else 0.0,
        offset_probability=settings.noise_offset_probability,
        perturbation=settings.input_perturbation,
        perturbation_steps=settings.input_perturbation_steps,
    )


@dataclass(frozen=True)
class NoiseSample:
    """The random values of the forward process for the images of one batch."""

    noise: Tensor  # (B, C, H, W) float32: the noise of the target
    perturbed_noise: Tensor | None  # (B, C, H, W) float32: the noise of the UNet's input, if it differs
    timesteps: Tensor  # (B,) int64
    rollouts: tuple[Rollout, ...]  # the items that the model denoises to their timesteps


@dataclass(frozen=True)
class ForwardProcess:
    """Samples noise, timesteps and rollouts of whole batches; what changes during the run is a function of the optimizer step."""

    timesteps: TimestepSampler
    noise: NoiseSampler = field(default_factory=NoiseSampler)
    rollouts: RolloutSampler | None = None
    accumulation: int = 1
    """Batches per optimizer step."""

    def sample(
        self, shape: Sequence[int], seed: int, index: int, slots: Sequence[int], global_batch_size: int
    ) -> NoiseSample:
        """Return the sample for the images in `slots` of the global batch `index`, whose latents have `shape` (C, H, W)."""
        step = index // self.accumulation
        noise = [self.noise.noise(shape, seed, index, slot) for slot in slots]
        perturbed = (
            [
                self.noise.perturbed(each, step, seed, index, slot)
                for each, slot in zip(noise, slots, strict=True)
            ]
            if self.noise.perturbation_at(step)
            else None
        )
        timesteps = [self.timesteps.sample(seed, index, slot, global_batch_size) for slot in slots]
        return NoiseSample(
            torch.stack(noise),
            torch.stack(perturbed) if perturbed else None,
            torch.tensor(timesteps),
            self.rollouts.sample(timesteps, step, seed, index, slots) if self.rollouts else (),
        )


def build_forward_process(
    noise: NoiseSettings,
    rollouts: ScheduledSamplingSettings,
    num_train_timesteps: int,
    accumulation: int,
) -> ForwardProcess:
    """Return the configured forward process of a training with `accumulation` batches per optimizer step."""
    return ForwardProcess(
        build_timestep_sampler(noise, num_train_timesteps),
        build_noise_sampler(noise),
        build_rollout_sampler(rollouts, num_train_timesteps),
        accumulation,
    )


def _generator(seed: int, purpose: str, index: int, slot: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, index, slot))
