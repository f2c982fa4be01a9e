"""Over-fitting is reported for a held-out loss that rises while the train probe falls, and not for noise or without enough images."""

import math

import pytest

from sdxl_pipeline.evaluation.overfitting import detect_overfitting, loss_points, probe_gap
from sdxl_pipeline.runtime.evaluation_report import CheckpointLoss, Overfitting, PairedDifference, ProbeGap
from sdxl_pipeline.training.logging.run_logs import EvalRow
from tests.support.eval_losses import around, loss_point, loss_summary

GAP = ProbeGap(mean=0.05, standard_error=0.01)


def detect(*points: tuple[float, float], spread: float = 0.0, images: int = 4) -> Overfitting:
    """Detect over (held-out, probe) losses at the steps 10, 20 and so on; every second step is noisy by `spread`."""
    series = [
        loss_point(10 * number, held_out, probe, spread if number % 2 else -spread, images)
        for number, (held_out, probe) in enumerate(points, 1)
    ]
    return detect_overfitting(series, GAP, "held-out share", images)


def test_detect_overfitting_u_shape_names_the_first_rising_step():
    result = detect((0.4, 0.4), (0.3, 0.3), (0.35, 0.2), (0.4, 0.1))
    assert (result.conclusive, result.from_step, result.gap) == (True, 30, GAP)
    assert result.text.startswith(
        "Over-fitting from step 30: the lowest held-out eval loss is that of step 20 (0.30000)"
    )
    assert "+0.05 ± 0.01" in result.text


@pytest.mark.parametrize(
    ("points", "sentence"),
    [
        ([(0.4, 0.4), (0.3, 0.3), (0.2, 0.2)], "the last one measured"),
        ([(0.4, 0.4), (0.3, 0.3), (0.3, 0.2), (0.3, 0.1)], "no 2 measured steps in a row"),
        # diverges on training images as well
        ([(0.4, 0.4), (0.3, 0.3), (0.5, 0.5), (0.6, 0.6)], "no 2 measured steps in a row"),
        # a single peak
        ([(0.4, 0.4), (0.3, 0.3), (0.4, 0.2), (0.3, 0.15), (0.4, 0.1)], "a single step may be noise"),
    ],
)
def test_detect_overfitting_other_curves_have_none(points: list[tuple[float, float]], sentence: str):
    result = detect(*points)
    assert (result.conclusive, result.from_step) == (True, None)
    assert sentence in result.text


def test_detect_overfitting_rise_within_one_error_is_noise():
    curve = (0.4, 0.4), (0.3, 0.3), (0.305, 0.2), (0.306, 0.1)
    assert detect(*curve).from_step == 30
    assert detect(*curve, spread=0.02).from_step is None


@pytest.mark.parametrize(
    ("source", "images", "points", "reason"),
    [
        ("training images", 8, 3, "there are no held-out images"),
        ("held-out share", 3, 3, "3 held-out images are fewer than 4"),
        ("held-out share", 4, 0, "set num_probe_images"),
        ("eval dataset", 4, 1, "one measured step has no trend"),
    ],
)
def test_detect_overfitting_without_evidence_cannot_be_determined(
    source: str, images: int, points: int, reason: str
):
    series = [loss_point(10, 0.3, 0.3), loss_point(20, 0.4, 0.2), loss_point(30, 0.5, 0.1)][:points]
    result = detect_overfitting(series, GAP, source, images)  # type: ignore[arg-type]
    assert (result.conclusive, result.from_step) == (False, None)
    assert result.text.startswith("Over-fitting cannot be determined: ")
    assert reason in result.text


def test_probe_gap_adds_the_squares_of_both_errors():
    base = loss_summary([0.5, 0.5, 0.5, 0.5])
    held_out, probe = around(0.4, 0.02), around(0.1, 0.01)
    gap = probe_gap(base, base, held_out, probe)
    assert gap is not None
    assert gap.mean == pytest.approx(0.3)
    deviation = math.sqrt(4 / 3)  # of +-1 over four images
    assert gap.standard_error == pytest.approx(deviation / 2 * math.hypot(0.02, 0.01))
    assert probe_gap(base, None, held_out, probe) is probe_gap(base, base, held_out, None) is None
    single = loss_summary([0.5])
    lone = probe_gap(base, single, held_out, loss_summary([0.1]))
    assert lone is not None
    assert (lone.mean, lone.standard_error) == (pytest.approx(0.3), None)


def test_loss_points_join_checkpoints_and_rows_of_the_same_images():
    base, other = around(0.5), loss_summary([0.5], prefix="other")
    difference = PairedDifference(images=4, mean=0.0, standard_error=0.0)
    checkpoint = CheckpointLoss(
        step=20, weights="trained", sha256="a", held_out=around(0.3), probe=around(0.2), to_base=difference
    )
    rows = [
        EvalRow(step=0, loss=base, probe=base),
        EvalRow(step=10, loss=around(0.4), probe=around(0.4)),
        EvalRow(step=15, loss=around(0.4)),
        EvalRow(step=20, loss=around(0.9), probe=around(0.9)),
        EvalRow(step=30, loss=other, probe=other),
        EvalRow(step=50, loss=around(0.4), probe=other),
    ]
    points = loss_points(
        [checkpoint, checkpoint.model_copy(update={"step": 40, "probe": None})], rows, base, base
    )
    assert [(point.step, round(point.held_out.mean, 3)) for point in points] == [(10, 0.4), (20, 0.3)]


def test_loss_points_leave_out_losses_that_are_not_finite():
    base, nan = around(0.5), around(math.nan)
    rows = [
        EvalRow(step=10, loss=nan, probe=nan),
        EvalRow(step=20, loss=around(0.3), probe=around(0.3)),
        EvalRow(step=30, loss=around(0.4), probe=around(0.2)),
        EvalRow(step=40, loss=around(0.4), probe=nan),
        EvalRow(step=50, loss=around(0.5), probe=around(0.1)),
    ]
    points = loss_points([], rows, base, base)
    assert [point.step for point in points] == [20, 30, 50]
    result = detect_overfitting(points, GAP, "held-out share", 4)
    assert (result.from_step, "step 20 (0.30000)" in result.text) == (30, True)
