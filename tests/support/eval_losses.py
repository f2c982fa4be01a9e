"""Builders of eval losses with known paired differences, without a model."""

from collections.abc import Sequence

from sdxl_pipeline.evaluation.overfitting import LossPoint
from sdxl_pipeline.runtime.evaluation_report import LossSummary


def loss_summary(by_image: Sequence[float], prefix: str = "image") -> LossSummary:
    """Return the losses of images named by their position; the mean over two timesteps equals that over the images."""
    mean = sum(by_image) / len(by_image)
    return LossSummary(
        mean=mean,
        by_timestep=((250, mean * 1.5), (750, mean * 0.5)),
        by_image=tuple((f"{prefix} {number}", loss) for number, loss in enumerate(by_image)),
    )


def around(mean: float, spread: float = 0.0, images: int = 4) -> LossSummary:
    """Return losses with this mean that alternate by `spread`: the standard error of their differences grows with it."""
    return loss_summary([mean + (spread if number % 2 else -spread) for number in range(images)])


def loss_point(step: int, held_out: float, probe: float, spread: float = 0.0, images: int = 4) -> LossPoint:
    return LossPoint(step, around(held_out, spread, images), around(probe, 0.0, images))
