"""The loss curve and the validation sheet: PNGs that show what they should, and the same bytes for the same run."""

from pathlib import Path

import numpy as np
from PIL import Image

from sdxl_pipeline.runtime.specs import ValidationImage
from sdxl_pipeline.training.logging.loss_plot import plot_loss_curve
from sdxl_pipeline.training.logging.metrics_log import StepMetrics
from sdxl_pipeline.training.validation.validation_grid import thinned, write_sheet


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


def test_the_loss_curve_is_drawn_and_reproducible(tmp_path):
    plot_loss_curve(make_rows(200), tmp_path / "a.png", "demo: 200 steps")
    plot_loss_curve(make_rows(200), tmp_path / "b.png", "demo: 200 steps")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    blue = sum(n for n, (r, g, b) in colours if b > 120 and r < 90)
    red = sum(n for n, (r, g, b) in colours if r > 170 and b < 110)
    assert blue > 500
    assert red > 200


def green(path: Path) -> np.ndarray:
    """Where the eval loss is drawn: (H, W) bool."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return (pixels[..., 1] > 110) & (pixels[..., 0] < 90) & (pixels[..., 2] < 120)


def test_eval_losses_are_drawn_beside_the_training_loss_on_an_axis_of_their_own_where_need_be(tmp_path):
    rows = make_rows(200)
    eval_losses = [(0, 0.9), (100, 0.5), (200, 0.3)]
    plot_loss_curve(rows, tmp_path / "none.png", "demo")
    plot_loss_curve(rows, tmp_path / "same.png", "demo", eval_losses)
    plot_loss_curve(rows, tmp_path / "apart.png", "demo", [(step, 50 * loss) for step, loss in eval_losses])
    assert green(tmp_path / "none.png").sum() == 0
    right = (slice(None), slice(990, None))  # beyond the axes: an axis of its own has its numbers there
    assert green(tmp_path / "same.png").sum() > 500
    assert green(tmp_path / "same.png")[right].sum() < 200
    assert green(tmp_path / "apart.png")[right].sum() > 400


def test_one_step_and_a_rate_of_zero_are_a_curve_too(tmp_path):
    plot_loss_curve([StepMetrics(1, 0.0, 0.0, None, 1.0)], tmp_path / "a.png", "one")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1080, 720)


def make_images(folder: Path) -> list[ValidationImage]:
    images = []
    for name, size, colour in (
        ("circle", (64, 64), "red"),
        ("a long name of a wide image", (96, 64), "blue"),
    ):
        for step in (0, 100, 200):
            path = folder / f"{name}-{step}.png"
            Image.new("RGB", size, colour).save(path)
            images.append(
                ValidationImage(step=step, name=name, prompt=f"a {colour} thing " * 9, path=str(path), seed=0)
            )
    return images


def test_the_sheet_has_a_row_per_prompt_and_a_column_per_step(tmp_path):
    images = make_images(tmp_path)
    write_sheet(images[:-1], tmp_path / "sheet.png")  # one image is missing: its place stays empty
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    red = (pixels == (255, 0, 0)).all(-1)
    blue = (pixels == (0, 0, 255)).all(-1)
    assert red.sum() == 3 * 64 * 64
    assert blue.sum() == 2 * 96 * 64
    assert np.flatnonzero(red.any(1)).max() < np.flatnonzero(blue.any(1)).min()
    assert (pixels[: np.flatnonzero(red.any(1)).min()] < 100).any()  # the steps' labels


def test_many_steps_are_thinned_to_first_last_and_some_between():
    assert thinned([0, 10, 20], 9) == [0, 10, 20]
    assert thinned(list(range(0, 1001, 10)), 5) == [0, 250, 500, 750, 1000]
