"""Measurement of shape, colours, size and place in a plain image of the world."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdxl_pipeline.demo.sdf import distance
from sdxl_pipeline.demo.shape_world import COLORS, PLACES, SHAPES, SIZES, Spec

_CORNER_PIXELS = 8  # pixels of each corner that count as background
_MIN_CONTRAST = 60.0  # distance in RGB from which a pixel belongs to the shape
_MIN_SHAPE_PIXELS = 60  # smaller regions are noise


@dataclass(frozen=True)
class Measurement:
    """Measured properties of an image; None if there is no shape. `overlap` is the IoU with the ideal shape."""

    background: str
    color: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None
    overlap: float = 0.0


@torch.no_grad()
def measure(image: Tensor) -> Measurement:
    """Measure the image (3, H, W) in [-1, 1]: its background and its largest connected foreground region."""
    height, width = image.shape[1:]
    pixels = ((image.float() + 1) * 127.5).clamp(0, 255)
    k = _CORNER_PIXELS
    corners = torch.cat(
        [pixels[:, rows, columns].reshape(3, -1) for rows in _ends(k) for columns in _ends(k)], dim=1
    )
    ground = corners.median(1).values
    background = _nearest_color(ground)
    region = _largest_region((pixels - ground[:, None, None]).norm(dim=0) > _MIN_CONTRAST)
    if region.sum() < _MIN_SHAPE_PIXELS:
        return Measurement(background)
    ys, xs = region.nonzero(as_tuple=True)
    box = (ys.min().item(), xs.min().item(), ys.max().item() + 1, xs.max().item() + 1)
    fit = _best_fit(region, box)
    center = (fit.center_x / width, fit.center_y / height)
    side = math.sqrt(height * width)
    return Measurement(
        background=background,
        color=_nearest_color(pixels[:, region].median(1).values),
        shape=fit.shape,
        size=min(SIZES, key=lambda name: abs(math.log(SIZES[name] * side / fit.radius))),
        place=min(PLACES, key=lambda name: math.dist(PLACES[name], center)),
        overlap=fit.overlap,
    )


def agreement(images: list[Tensor], specs: list[Spec]) -> dict[str, float]:
    """Return the share of images whose measured background, colour, shape, size and place match their specs."""
    measurements = [measure(image) for image in images]
    return {
        key: sum(getattr(s, key) == getattr(spec, key) for s, spec in zip(measurements, specs, strict=True))
        / len(specs)
        for key in ("background", "color", "shape", "size", "place")
    }


def _ends(k: int) -> tuple[slice, slice]:
    return slice(None, k), slice(-k, None)


def _nearest_color(color: Tensor) -> str:
    return min(COLORS, key=lambda name: (torch.tensor(COLORS[name]) - color).norm().item())


def _largest_region(mask: Tensor) -> Tensor:
    """Return the largest 8-connected region of `mask` (H, W), by propagating the highest label within each region."""
    height, width = mask.shape
    labels = (torch.arange(1, height * width + 1).view(1, 1, height, width)).float() * mask
    while True:
        spread = labels
        for _ in range(8):
            spread = F.max_pool2d(spread, 3, stride=1, padding=1) * mask
        if torch.equal(spread, labels):
            break
        labels = spread
    if not mask.any():
        return mask
    regions, counts = labels[labels > 0].unique(return_counts=True)
    return labels[0, 0] == regions[counts.argmax()]


@dataclass(frozen=True)
class _Fit:
    """An ideal shape fitted to a region; lengths in pixels."""

    shape: str
    overlap: float
    radius: float
    center_x: float
    center_y: float


def _best_fit(region: Tensor, box: tuple[float, float, float, float]) -> _Fit:
    """Return the ideal shape, fitted to `box` (top, left, bottom, right), with the largest overlap with `region`."""
    return max((_fit(shape, region, box) for shape in SHAPES), key=lambda fit: fit.overlap)


def _fit(shape: str, region: Tensor, box: tuple[float, float, float, float]) -> _Fit:
    top, left, bottom, right = box
    height, width = region.shape
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    low_x, high_x, low_y, high_y = _EXTENTS[shape]
    radius = 0.5 * ((right - left) / (high_x - low_x) + (bottom - top) / (high_y - low_y))
    center_x = (left + right) / 2 - radius * (low_x + high_x) / 2
    center_y = (top + bottom) / 2 - radius * (low_y + high_y) / 2
    ideal = distance(shape, (x - center_x) / radius, (y - center_y) / radius) < 0
    overlap = ((ideal & region).sum() / (ideal | region).sum()).item()
    return _Fit(shape, overlap, radius, center_x, center_y)


def _extent(shape: str) -> tuple[float, float, float, float]:
    """Return minimum and maximum x, minimum and maximum y of `shape` in units of its radius."""
    line = torch.linspace(-1.3, 1.3, 521)
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = distance(shape, x, y) < 0
    return (
        x[inside].min().item(),
        x[inside].max().item(),
        y[inside].min().item(),
        y[inside].max().item(),
    )


_EXTENTS = {shape: _extent(shape) for shape in SHAPES}
