"""Renderer of shape specs as batches of antialiased images."""

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdxl_pipeline.demo.sdf import distance, freeform_distance
from sdxl_pipeline.demo.shape_world import COLORS, PLACES, SIZES, FreeForm, Mark, Spec

if TYPE_CHECKING:
    from PIL.Image import Image

# Per mark: the radius of an inner shape, and of the eyes, as shares of the body's radius.
_INNER_RADIUS = 0.36
_EYE_RADIUS = {1: 0.4, 2: 0.27}
_EYE_DISTANCE = 0.31
_PUPIL_SHARE = 0.5


@torch.no_grad()
def render(
    specs: Sequence[Spec],
    size: tuple[int, int],
    rng: random.Random | None,
    frames: Sequence[tuple[int, int, int, int]] | None = None,
) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of `specs` at `size` (height, width).

    `rng` jitters place, size, colours and pattern; None renders the ideal image. `frames` has (original height,
    original width, crop top, crop left) per image: the spec is rendered on the original canvas, which is resized to
    cover `size` and cropped at (top, left).
    """
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    canvases = [_canvas(size, frames[i] if frames else (height, width, 0, 0)) for i in range(len(specs))]
    geometry = torch.tensor(
        [_shape_geometry(s, canvas, rng) for s, canvas in zip(specs, canvases, strict=True)]
    )
    center_x, center_y, radius = (column[:, None, None] for column in geometry.unbind(1))
    u, v = (x - center_x) / radius, (y - center_y) / radius  # (B, H, W)

    body = _silhouettes(specs, u, v) * radius
    image = _colors([s.background for s in specs], rng)
    outline = torch.tensor([_outline_width(spec, rng) for spec in specs])
    outline_px = torch.maximum(
        outline[:, None, None] * radius, torch.tensor(3.0 * math.sqrt(height * width) / 128)
    )
    cover = _coverage(body - outline_px) * (outline > 0)[:, None, None]
    image = _composite(image, _colors([s.outline or s.background for s in specs], rng), cover)
    fill = _composite(
        _colors([s.color for s in specs], rng),
        _colors([s.second_color or s.color for s in specs], rng),
        _patterns(specs, u, v, radius, rng),
    )
    image = _composite(image, fill, _coverage(body))
    return _draw_marks(image, specs, u, v, radius, rng) / 127.5 - 1


@torch.no_grad()
def render_art(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return images (B, 3, H, W) in [-1, 1] outside the world: gradients, stripes, overlapping rotated shapes, haze.

    The VAE is trained on them too, so that it generalizes to concepts that are not in the world.
    """
    height, width = size

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")

    def fill() -> Tensor:
        first, second, angle = (
            uniform(count, 3, 1, 1),
            uniform(count, 3, 1, 1),
            uniform(count, 1, 1) * 2 * math.pi,
        )
        along = (x - width / 2) * torch.cos(angle) + (y - height / 2) * torch.sin(angle)
        gradient = (along / max(height, width) + 0.5).clamp(0, 1)
        stripes = _stripes(along, 10 + 30 * uniform(count, 1, 1))
        kind = uniform(count, 1, 1)
        mix = torch.where(kind < 0.55, torch.zeros_like(along), torch.where(kind < 0.75, gradient, stripes))
        return first + (second - first) * mix[:, None]

    image = fill()
    names = ("circle", "square", "triangle", "diamond", "ring", "cross", "heart", "star", "moon", "arrow")
    for _ in range(3):
        which = torch.randint(len(names), (count,), generator=generator)
        inside, rim = fill(), uniform(count, 3, 1, 1)
        radius = 8 + 40 * uniform(count, 1, 1)
        turn = uniform(count, 1, 1) * 2 * math.pi * (uniform(count, 1, 1) < 0.5)
        u, v = (x - uniform(count, 1, 1) * width) / radius, (y - uniform(count, 1, 1) * height) / radius
        u, v = u * torch.cos(turn) + v * torch.sin(turn), v * torch.cos(turn) - u * torch.sin(turn)
        body = torch.empty(count, height, width)
        for k, name in enumerate(names):
            rows = (which == k).nonzero()[:, 0]
            if len(rows):
                body[rows] = distance(name, u[rows], v[rows]) * radius[rows]
        is_filled, rimmed = (uniform(count, 1, 1) < 0.8).float(), (uniform(count, 1, 1) < 0.4).float()
        rim_px = 2 + 6 * uniform(count, 1, 1)
        image = _composite(image, rim, _coverage(body - rim_px) * is_filled * rimmed)
        image = _composite(image, inside, _coverage(body) * is_filled)
    haze = torch.randn(count, 3, height // 16, width // 16, generator=generator)
    haze = torch.nn.functional.interpolate(haze, (height, width), mode="bicubic", align_corners=False)
    image = image + 0.15 * haze * (uniform(count, 1, 1, 1) < 0.15)
    return image.clamp(0, 1) * 2 - 1


def to_image(image: Tensor) -> "Image":
    """Return the PIL image of a tensor (3, H, W) in [-1, 1]."""
    from PIL import Image

    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def _canvas(size: tuple[int, int], frame: tuple[int, int, int, int]) -> tuple[float, float, int, int]:
    """Return height and width of the resized original in pixels of the image, and the crop's top and left."""
    original_h, original_w, top, left = frame
    scale = max(size[0] / original_h, size[1] / original_w)
    return original_h * scale, original_w * scale, top, left


def _shape_geometry(
    spec: Spec, canvas: tuple[float, float, int, int], rng: random.Random | None
) -> tuple[float, float, float]:
    """Return centre x, centre y and radius of the shape in pixels of the image."""
    height, width, top, left = canvas
    radius = SIZES[spec.size] * math.sqrt(height * width) * _jitter(rng, 0.93, 1.07, 1.0)
    share_x, share_y = PLACES[spec.place]
    x = (share_x + _jitter(rng, -0.025, 0.025, 0.0)) * width
    y = (share_y + _jitter(rng, -0.025, 0.025, 0.0)) * height
    margin = radius * (1.35 if spec.outline else 1.08)  # keep the shape and its outline inside the canvas
    x = min(max(x, margin), width - margin)
    y = min(max(y, margin), height - margin)
    return x - left, y - top, radius


def _outline_width(spec: Spec, rng: random.Random | None) -> float:
    """Return the width of the outline as a share of the radius; 0 for none."""
    if spec.outline is None:
        return 0.0
    return spec.outline_width or _jitter(rng, 0.14, 0.26, 0.2)


def _silhouettes(specs: Sequence[Spec], u: Tensor, v: Tensor) -> Tensor:
    """Return signed distances (B, H, W) of every spec's shape in units of its radius."""
    out = torch.empty_like(u)
    for shape in {s.shape for s in specs}:
        rows = torch.tensor([i for i, s in enumerate(specs) if s.shape == shape])
        if shape == "freeform":
            forms = [f for s in specs if s.shape == shape and (f := s.freeform) is not None]
            out[rows] = _freeforms(forms, u[rows], v[rows])
        else:
            out[rows] = distance(shape, u[rows], v[rows])
    return out


def _freeforms(forms: Sequence[FreeForm], u: Tensor, v: Tensor) -> Tensor:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values)[:, None, None]

    return freeform_distance(
        u,
        v,
        lobes=column([f.lobes for f in forms]),
        depth=column([f.depth for f in forms]),
        phase=column([f.phase for f in forms]),
        pointed=column([f.pointed for f in forms]),
        dents=torch.tensor([f.dents for f in forms])[:, :, None, None],
    )


def _patterns(
    specs: Sequence[Spec], u: Tensor, v: Tensor, radius: Tensor, rng: random.Random | None
) -> Tensor:
    """Return the coverage (B, H, W) by the second colour: none, stripes at one of three angles, or a grid of dots."""
    cover = torch.zeros_like(u)
    for i, spec in enumerate(specs):
        if spec.pattern == "striped":
            angle = (0.0 if rng is None else rng.choice((0, 1, 2))) * math.pi / 4
            along = (u[i] * math.cos(angle) + v[i] * math.sin(angle)) * radius[i]
            cover[i] = _stripes(along, radius[i] * 0.62)
        elif spec.pattern == "dotted":
            pitch = 0.62
            du, dv = (torch.remainder(w[i] / pitch, 1) - 0.5 for w in (u, v))
            cover[i] = _coverage((torch.hypot(du, dv) - 0.3) * pitch * radius[i])
    return cover


def _draw_marks(
    image: Tensor, specs: Sequence[Spec], u: Tensor, v: Tensor, radius: Tensor, rng: random.Random | None
) -> Tensor:
    for i, spec in enumerate(specs):
        mark = spec.mark
        if mark is None:
            continue
        if mark.eyes:
            image[i] = _draw_eyes(image[i], mark, u[i], v[i], radius[i])
        elif mark.shape is not None:
            scale = _INNER_RADIUS
            inner = distance(mark.shape, u[i] / scale, v[i] / scale) * scale * radius[i]
            image[i] = _composite(image[i : i + 1], _colors([mark.color], rng), _coverage(inner)[None])[0]
    return image


def _draw_eyes(image: Tensor, mark: Mark, u: Tensor, v: Tensor, radius: Tensor) -> Tensor:
    white, black = (
        torch.tensor(COLORS[c], dtype=torch.float32)[None, :, None, None] for c in ("white", "black")
    )
    eye = _EYE_RADIUS[mark.eyes] * mark.scale
    out = image[None]
    for x in (0.0,) if mark.eyes == 1 else (-_EYE_DISTANCE, _EYE_DISTANCE):
        radial_distance = torch.hypot(u - x, v)
        out = _composite(out, white, _coverage((radial_distance - eye) * radius)[None])
        out = _composite(out, black, _coverage((radial_distance - eye * _PUPIL_SHARE) * radius)[None])
    return out[0]


def _stripes(along: Tensor, period: Tensor) -> Tensor:
    """Return antialiased stripes of half the `period` (pixels) each, across the coordinate `along` (pixels)."""
    triangle = (torch.remainder(along / period, 1) - 0.5).abs() * 2 - 0.5
    return (0.5 + triangle * period / 2).clamp(0, 1)


def _coverage(signed_distance: Tensor) -> Tensor:
    """Return the share of each pixel inside the shape, from the signed distance of its centre in pixels."""
    return (0.5 - signed_distance).clamp(0, 1)


def _composite(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    """Return `above` composited over `below` (both (B, 3, H, W) or broadcastable) with opacity `cover` (B, H, W)."""
    return below + (above - below) * cover[:, None]


def _colors(names: Sequence[str], rng: random.Random | None) -> Tensor:
    """Return colours (B, 3, 1, 1) in 0..255 with jittered channels."""
    rows = [
        [min(255.0, max(0.0, value + _jitter(rng, -7, 7, 0))) for value in COLORS[name]] for name in names
    ]
    return torch.tensor(rows)[:, :, None, None]


def _jitter(rng: random.Random | None, low: float, high: float, ideal: float) -> float:
    return ideal if rng is None else rng.uniform(low, high)
