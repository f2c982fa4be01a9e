"""The noise of each image: what the UNet is asked for, and what it is shown."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.rng import derive_seed, uniform


@dataclass(frozen=True)
class NoiseSampler:
    """The noise of every slot of a global batch, a pure function of (seed, batch, slot), drawn on the CPU: the same on every device."""

    offset: float = 0.0
    """Deviation of a further noise that is constant over a channel (Guttenberg 2023, "Diffusion with Offset Noise")."""
    offset_probability: float = 1.0
    perturbation: float = 0.0
    """Deviation of the noise that the UNet sees beyond what it is asked for (Ning et al. 2023, "Input Perturbation Reduces Exposure
    Bias in Diffusion Models")."""
    perturbation_steps: int = 0
    """Optimizer steps over which the perturbation falls to 0; 0 keeps it."""

    def noise(self, shape: Sequence[int], seed: int, index: int, slot: int) -> Tensor:
        """eps: float32 of `shape` (C, H, W), the target's noise."""
        noise = torch.randn(*shape, generator=_generator(seed, "noise", index, slot))
        if self.offset and uniform(seed, "offset this one", index, slot) < self.offset_probability:
            generator = _generator(seed, "noise offset", index, slot)
            noise += self.offset * torch.randn(shape[0], 1, 1, generator=generator)
        return noise

    def perturbation_at(self, step: int) -> float:
        """Deviation of the perturbation in an optimizer step, counted from 0."""
        if not self.perturbation_steps:
            return self.perturbation
        return self.perturbation * max(0.0, 1 - step / self.perturbation_steps)

    def perturbed(self, noise: Tensor, step: int, seed: int, index: int, slot: int) -> Tensor:
        """`noise` (C, H, W) as the UNet sees it."""
        generator = _generator(seed, "input perturbation", index, slot)
        return noise + self.perturbation_at(step) * torch.randn(noise.shape, generator=generator)


def build_noise_sampler(settings: TrainingSettings) -> NoiseSampler:
    """The draw that the settings ask for."""
    return NoiseSampler(
        offset=settings.noise_offset if settings.offset_noise else 0.0,
        offset_probability=settings.noise_offset_probability,
        perturbation=settings.input_perturbation,
        perturbation_steps=settings.input_perturbation_steps,
    )


def _generator(seed: int, purpose: str, index: int, slot: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, purpose, index, slot))
