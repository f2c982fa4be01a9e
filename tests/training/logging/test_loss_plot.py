"""The loss curve and the validation grid are PNGs with the expected content, reproducible byte for byte."""

from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.runtime.specs import ValidationImage
from sdxl_pipeline.training.logging.loss_plot import RunCurves, plot_loss_curve, plot_runs
from sdxl_pipeline.training.logging.run_logs import StepMetrics
from sdxl_pipeline.training.validation.validation_images import spread_evenly, write_validation_grid


def make_rows(count: int) -> list[StepMetrics]:
    generator = np.random.default_rng(0)
    return [
        StepMetrics(
            step,
            float(0.2 + 0.8 * np.exp(-step / 60) + 0.05 * generator.standard_normal()),
            1e-4 * min(1, step / 20),
            0.5,
            4.0,
        )
        for step in range(1, count + 1)
    ]


def count_colors(path: Path) -> tuple[int, int]:
    """Return the numbers of blue and of red pixels."""
    with Image.open(path) as image:
        colors = image.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    blue = sum(n for n, (r, g, b) in colors if b > 120 and r < 90)
    return blue, sum(n for n, (r, g, b) in colors if r > 170 and b < 110)


def test_plot_runs_shows_both_runs_with_and_without_eval_losses(tmp_path):
    first = RunCurves("first", make_rows(200), ((0, 0.5), (200, 0.2)))
    second = RunCurves("second", make_rows(100), ())
    plot_runs(first, second, tmp_path / "eval.png")
    plot_runs(RunCurves("first", make_rows(200), ()), second, tmp_path / "training.png")
    for name in ("eval", "training"):
        assert min(count_colors(tmp_path / f"{name}.png")) > 300
    plot_runs(first, RunCurves("second", (), ()), tmp_path / "empty.png")
    assert count_colors(tmp_path / "empty.png")[0] > 300


def test_plot_loss_curve_twice_writes_same_bytes_with_both_colors(tmp_path):
    plot_loss_curve(make_rows(200), tmp_path / "a.png", "demo: 200 steps")
    plot_loss_curve(make_rows(200), tmp_path / "b.png", "demo: 200 steps")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    blue, red = count_colors(tmp_path / "a.png")
    assert blue > 500
    assert red > 200


def eval_loss_pixels(path: Path) -> np.ndarray:
    """Return the mask of pixels in the color of the eval loss: (H, W) bool."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (pixels[..., 1] > 110) & (pixels[..., 0] < 90) & (pixels[..., 2] < 120)


def test_plot_loss_curve_eval_losses_share_axis_unless_too_different(tmp_path):
    rows = make_rows(200)
    eval_losses = [(0, 0.9), (100, 0.5), (200, 0.3)]
    plot_loss_curve(rows, tmp_path / "none.png", "demo")
    plot_loss_curve(rows, tmp_path / "same.png", "demo", eval_losses)
    plot_loss_curve(
        rows, tmp_path / "separate.png", "demo", [(step, 50 * loss) for step, loss in eval_losses]
    )
    assert eval_loss_pixels(tmp_path / "none.png").sum() == 0
    right = (slice(None), slice(990, None))  # right of the axes, where the tick labels of a second axis are
    assert eval_loss_pixels(tmp_path / "same.png").sum() > 500
    assert eval_loss_pixels(tmp_path / "same.png")[right].sum() < 200
    assert eval_loss_pixels(tmp_path / "separate.png")[right].sum() > 400


def test_plot_loss_curve_single_step_with_zero_lr_writes_image(tmp_path):
    plot_loss_curve([StepMetrics(1, 0.0, 0.0, None, 1.0)], tmp_path / "a.png", "one")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1080, 720)


def make_images(folder: Path) -> list[ValidationImage]:
    images = []
    for name, size, color in (
        ("circle", (64, 64), "red"),
        ("a long name of a wide image", (96, 64), "blue"),
    ):
        for step in (0, 100, 200):
            path = folder / f"{name}-{step}.png"
            Image.new("RGB", size, color).save(path)
            images.append(
                ValidationImage(step=step, name=name, prompt=f"a {color} thing " * 9, path=str(path), seed=0)
            )
    return images


def test_write_validation_grid_has_row_per_name_and_column_per_step(tmp_path):
    images = make_images(tmp_path)
    write_validation_grid(images[:-1], tmp_path / "grid.png")  # the cell of the missing image stays empty
    with Image.open(tmp_path / "grid.png") as grid:
        pixels = np.asarray(grid.convert("RGB")).astype(int)
    red = (pixels == (255, 0, 0)).all(-1)
    blue = (pixels == (0, 0, 255)).all(-1)
    assert red.sum() == 3 * 64 * 64
    assert blue.sum() == 2 * 96 * 64
    assert np.flatnonzero(red.any(1)).max() < np.flatnonzero(blue.any(1)).min()
    assert (pixels[: np.flatnonzero(red.any(1)).min()] < 100).any()  # step labels


def test_spread_evenly_many_steps_keeps_first_and_last():
    assert spread_evenly([0, 10, 20], 9) == [0, 10, 20]
    assert spread_evenly(list(range(0, 1001, 10)), 5) == [0, 250, 500, 750, 1000]
