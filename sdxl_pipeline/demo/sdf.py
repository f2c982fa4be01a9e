"""Signed distance functions of the world's silhouettes in unit coordinates: negative inside, y pointing down.

The formulas for the heart and the star follow Inigo Quilez, "2D distance functions"; the others are elementary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_SQRT_HALF = math.sqrt(0.5)


def distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Return the signed distance of the points (x, y) to `shape`, in units of its radius. Raise KeyError if unknown."""
    return _DISTANCES[shape](x, y)


def freeform_distance(
    x: Tensor, y: Tensor, lobes: Tensor, depth: Tensor, phase: Tensor, pointed: Tensor, dents: Tensor
) -> Tensor:
    """Return the distance to a polar silhouette (`shape_world.FreeForm`); parameters are (B, 1, 1), dents (B, 4, 1, 1)."""
    angle = torch.atan2(y, x)
    wave = torch.cos(lobes * angle + phase)
    # arccos converts the cosine to a triangle wave, so that lobes become points
    wave = torch.where(pointed, 1 - 2 * torch.acos(wave.clamp(-1, 1)) / math.pi, wave)
    radius = 0.8 * (1 + depth * wave)
    radius = radius + dents[:, 0] * torch.cos(angle) + dents[:, 1] * torch.sin(angle)
    radius = radius + dents[:, 2] * torch.cos(2 * angle) + dents[:, 3] * torch.sin(2 * angle)
    return (torch.hypot(x, y) - radius) * 0.8  # 0.8: the mean slope of these outlines


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.95


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.82


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    return torch.maximum(y, torch.maximum(x * cos - y * sin, -x * cos - y * sin)) - 0.6


def _diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() * 1.35 + y.abs() - 1.15) / 1.68


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.75).abs() - 0.25


def _cross(x: Tensor, y: Tensor) -> Tensor:
    a, b = x.abs(), y.abs()
    return torch.minimum(torch.maximum(a - 0.32, b - 1), torch.maximum(a - 1, b - 0.32))


def _heart(x: Tensor, y: Tensor) -> Tensor:
    scale = 1.7
    a, b = x.abs() / scale, 0.55 - y / scale
    lobe = torch.hypot(a - 0.25, b - 0.75) - math.sqrt(2) / 4
    half = 0.5 * (a + b).clamp(min=0)
    side = torch.minimum(torch.hypot(a, b - 1), torch.hypot(a - half, b - half)) * torch.sign(a - b)
    return torch.where(a + b > 1, lobe, side) * scale


def pointed_star(x: Tensor, y: Tensor, points: int, outer: float, inner: float) -> Tensor:
    """Return the distance to a star with `points` tips at radius `outer`, notches at `inner`, one tip up; mitred outside."""
    segment = 2 * math.pi / points
    angle = torch.atan2(x, -y)
    angle = (torch.remainder(angle + segment / 2, segment) - segment / 2).abs()
    radius = torch.hypot(x, y)
    px, py = radius * torch.cos(angle), radius * torch.sin(angle)
    notch_x, notch_y = inner * math.cos(segment / 2), inner * math.sin(segment / 2)
    normal_x, normal_y = notch_y, outer - notch_x
    return ((px - outer) * normal_x + py * normal_y) / math.hypot(normal_x, normal_y)


def _star(x: Tensor, y: Tensor) -> Tensor:
    return pointed_star(x, y, 5, 1.1, 0.45)


def _moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x + 0.12, y) - 0.98, 0.8 - torch.hypot(x - 0.4, y))


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum(y + 0.02, (x.abs() - y - 1) * _SQRT_HALF)
    shaft = torch.maximum(x.abs() - 0.3, (y - 0.45).abs() - 0.5)
    return torch.minimum(head, shaft)


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "ring": _ring,
    "cross": _cross,
    "heart": _heart,
    "star": _star,
    "moon": _moon,
    "arrow": _arrow,
}
