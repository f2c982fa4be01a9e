"""metrics.jsonl: every step once and in order, whatever interrupted the run."""

from pathlib import Path

import pytest

from sdxl_pipeline.training.logging.metrics_log import MetricsLog, StepMetrics, final_loss, read_metrics


def row(step: int, loss: float = 0.5) -> StepMetrics:
    return StepMetrics(step, loss, 1e-4, None if step == 2 else 0.25, 12.5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_rows_come_back(path):
    log = MetricsLog(path, resumed_at=0)
    log.append([row(1), row(2)])
    log.append([row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]


def test_what_else_is_known_of_a_step_is_kept_and_is_a_figure(path):
    known = StepMetrics(1, 0.5, 1e-4, None, 8.0, 2.0, 30.0, {"ema_decay": 0.75})
    MetricsLog(path, 0).append([known])
    assert read_metrics(path) == [known]
    assert known.figures == {
        "loss": 0.5,
        "lr": 1e-4,
        "samples_per_second": 8.0,
        "steps_per_second": 2.0,
        "eta_seconds": 30.0,
        "ema_decay": 0.75,
    }


def test_resuming_drops_what_will_be_written_again(path):
    MetricsLog(path, 0).append([row(step, loss=1.0) for step in range(1, 8)])
    MetricsLog(path, 4).append([row(step, loss=2.0) for step in range(5, 8)])
    assert [(r.step, r.loss) for r in read_metrics(path)] == [
        (s, 1.0 if s <= 4 else 2.0) for s in range(1, 8)
    ]
    MetricsLog(path, 0)
    assert read_metrics(path) == []


def test_a_line_cut_short_by_a_kill_is_no_row(path):
    MetricsLog(path, 0).append([row(1), row(2)])
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_metrics(path) == [row(1), row(2)]
    MetricsLog(path, 2).append([row(3)])
    assert read_metrics(path) == [row(1), row(2), row(3)]


def test_the_final_loss_is_the_last_tenth():
    rows = [row(step, loss=float(step)) for step in range(1, 41)]
    assert final_loss(rows) == (37 + 38 + 39 + 40) / 4
    assert final_loss(rows[:3]) == 3.0
