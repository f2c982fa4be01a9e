"""What is done to the images of a batch before the UNet sees them: noise, timesteps, and the model's own steps to these."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.diffusion.noise import NoiseSampler, build_noise_sampler
from sdxl_pipeline.training.diffusion.scheduled_sampling import Rollout, RolloutSampler, build_rollout_sampler
from sdxl_pipeline.training.diffusion.timesteps import TimestepSampler, build_timestep_sampler


@dataclass(frozen=True)
class NoiseSample:
    """What was drawn for the images of one batch."""

    noise: Tensor  # (B, C, H, W) float32: what the UNet is asked for
    perturbed_noise: Tensor | None  # (B, C, H, W) float32: what it sees, where that differs
    timesteps: Tensor  # (B,) int64
    rollouts: tuple[Rollout, ...]  # the items that the model itself brings to their timesteps


@dataclass(frozen=True)
class ForwardProcess:
    """How noise and timesteps are drawn: pure functions of (seed, batch, slot), and of the optimizer step where they change with it."""

    timesteps: TimestepSampler
    noise: NoiseSampler = field(default_factory=NoiseSampler)
    rollouts: RolloutSampler | None = None
    accumulation: int = 1
    """Batches in an optimizer step."""

    def draw(
        self, shape: Sequence[int], seed: int, index: int, slots: Sequence[int], global_batch_size: int
    ) -> NoiseSample:
        """For the images in `slots` of the global batch `index`, whose latents have `shape` (C, H, W)."""
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
        timesteps = [self.timesteps.draw(seed, index, slot, global_batch_size) for slot in slots]
        return NoiseSample(
            torch.stack(noise),
            torch.stack(perturbed) if perturbed else None,
            torch.tensor(timesteps),
            self.rollouts.draw(timesteps, step, seed, index, slots) if self.rollouts else (),
        )


def build_forward_process(settings: TrainingSettings, num_train_timesteps: int) -> ForwardProcess:
    """What the settings ask for."""
    return ForwardProcess(
        build_timestep_sampler(settings, num_train_timesteps),
        build_noise_sampler(settings),
        build_rollout_sampler(settings, num_train_timesteps),
        settings.gradient_accumulation_steps,
    )
