"""The logs of a run keep each step once and in order, also after interruptions."""

import math
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.specs import ValidationImage
from sdxl_pipeline.training.logging.run_logs import (
    EVAL_LOSS_FILE,
    METRICS_FILE,
    VALIDATION_FILE,
    EvalRow,
    StepMetrics,
    eval_loss_log,
    final_loss,
    metrics_log,
    read_eval_losses,
    read_metrics,
    read_validation_images,
    validation_log,
)


def row(step: int, loss: float = 0.5) -> StepMetrics:
    return StepMetrics(step, loss, 1e-4, None if step == 2 else 0.25, 12.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / METRICS_FILE


def test_metrics_log_append_read_metrics_returns_rows(path):
    log = metrics_log(path.parent, resumed_at=0)
    log.append([row(1), row(2)])
    log.append([row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]


def test_step_metrics_with_scalars_round_trips_and_lists_known_metrics(path):
    row = StepMetrics(1, 0.5, 1e-4, None, 8.0, 2.0, 30.0, {"ema_decay": 0.75})
    metrics_log(path.parent, 0).append([row])
    assert read_metrics(path) == [row]
    assert row.metrics == {
        "loss": 0.5,
        "lr": 1e-4,
        "samples_per_second": 8.0,
        "steps_per_second": 2.0,
        "eta_seconds": 30.0,
        "ema_decay": 0.75,
    }


def test_metrics_log_resumed_drops_later_rows(path):
    metrics_log(path.parent, 0).append([row(step, loss=1.0) for step in range(1, 8)])
    metrics_log(path.parent, 4).append([row(step, loss=2.0) for step in range(5, 8)])
    assert [(r.step, r.loss) for r in read_metrics(path)] == [
        (s, 1.0 if s <= 4 else 2.0) for s in range(1, 8)
    ]
    metrics_log(path.parent, 0)
    assert read_metrics(path) == []


def test_read_metrics_incomplete_last_line_is_ignored(path):
    metrics_log(path.parent, 0).append([row(1), row(2)])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(path) == [row(1), row(2)]
    metrics_log(path.parent, 2).append([row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]


def test_final_loss_is_mean_of_last_tenth():
    rows = [row(step, loss=float(step)) for step in range(1, 41)]
    assert final_loss(rows) == (37 + 38 + 39 + 40) / 4
    assert final_loss(rows[:3]) == 3.0


def test_eval_loss_log_resumed_drops_later_rows_and_incomplete_line(tmp_path):
    log = eval_loss_log(tmp_path, resumed_at=0)
    path = tmp_path / EVAL_LOSS_FILE
    assert not path.exists()
    rows = [EvalRow(step=step, loss=LossSummary(mean=0.1, by_timestep=((500, 0.1),))) for step in (0, 4, 8)]
    for row in rows:
        log.append([row])
    with path.open("a") as file:
        file.write('{"step": 12, "lo')
    resumed = eval_loss_log(tmp_path, resumed_at=6)
    assert [resumed.has(step) for step in (0, 4, 8, 12)] == [True, True, False, False]
    assert read_eval_losses(path) == rows[:2]


def test_eval_loss_log_keeps_losses_that_are_not_finite(tmp_path):
    losses = LossSummary(mean=math.nan, by_timestep=((500, math.inf),), by_image=(("a", math.nan),))
    eval_loss_log(tmp_path, 0).append([EvalRow(step=4, loss=losses)])
    (row,) = read_eval_losses(tmp_path / EVAL_LOSS_FILE)
    assert math.isnan(row.loss.mean)
    assert row.loss.by_timestep == ((500, math.inf),)
    assert math.isnan(row.loss.by_image[0][1])


def make_image(run_dir: Path, step: int) -> ValidationImage:
    path = run_dir / "validation" / f"{step}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"png")
    return ValidationImage(step=step, name="x", prompt="p", path=str(path), seed=1)


def test_validation_log_resumed_and_moved_lists_existing_images(tmp_path):
    run_dir = tmp_path / "run"
    images = [make_image(run_dir, step) for step in (0, 4, 8)]
    log = validation_log(run_dir, resumed_at=0)
    for image in images:
        log.append([image])
    validation_log(run_dir, resumed_at=6)
    assert read_validation_images(run_dir / VALIDATION_FILE) == images[:2]
    moved = run_dir.rename(tmp_path / "moved")
    resumed = validation_log(moved, resumed_at=6)
    assert (resumed.has(4), resumed.has(8)) == (True, False)
    image = read_validation_images(moved / VALIDATION_FILE)[1]
    assert image.path == str(moved / "validation" / "4.png")
    Path(image.path).unlink()
    assert not validation_log(moved, resumed_at=6).has(4)
