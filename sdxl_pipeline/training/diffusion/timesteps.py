"""Which timesteps are trained on: all alike, some more often than others, or spread evenly over a global batch."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.rng import choose, derive_seed, uniform


@dataclass(frozen=True)
class TimestepSampler:
    """The timestep of every slot of a global batch, a pure function of (seed, batch, slot)."""

    num_train_timesteps: int
    favoured: range | None = None
    """The timesteps that are drawn `multiplier` times as often as each of the others."""
    multiplier: float = 1.0
    segmented: bool = False
    """Cut the distribution into as many equally likely segments as a global batch has slots, and draw one timestep from each."""

    def draw(self, seed: int, index: int, slot: int, slots: int) -> int:
        """The timestep of `slot` in the global batch `index` of `slots` images."""
        if self.favoured is None and not self.segmented:
            generator = torch.Generator().manual_seed(derive_seed(seed, "timestep", index, slot))
            return int(torch.randint(self.num_train_timesteps, (1,), generator=generator))
        place = uniform(seed, "timestep", index, slot)
        if self.segmented:
            # turned at each batch, so that no slot, and with it no process, keeps to one end of the schedule
            segment = (slot + choose(slots, seed, "segment", index)) % slots
            place = (segment + place) / slots
        return int(np.searchsorted(self._cumulative, place, side="right"))

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """Probability that the timestep is at most t, (T,) float64; the last is 1."""
        weights = np.ones(self.num_train_timesteps)
        if self.favoured is not None:
            weights[self.favoured.start : self.favoured.stop] = self.multiplier
        cumulative = np.cumsum(weights)
        return cumulative / cumulative[-1]


def build_timestep_sampler(settings: TrainingSettings, num_train_timesteps: int) -> TimestepSampler:
    """The draw that the settings ask for."""
    return TimestepSampler(
        num_train_timesteps,
        settings.favoured_timesteps(num_train_timesteps),
        settings.timestep_bias_multiplier,
        segmented=not settings.disable_segmented_timestep_sampling,
    )
