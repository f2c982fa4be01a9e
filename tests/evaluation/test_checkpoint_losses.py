"""Stored losses are read instead of measured, and only as long as everything they depend on is equal."""

from pathlib import Path

import pytest

from sdxl_pipeline.evaluation.checkpoint_losses import CheckpointSeries, LossCache, ModelLosses
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.specs import CheckpointWeights
from tests.support.eval_losses import around

KEY = {"weights": "ab", "timesteps": [1, 2]}


class Measurement:
    def __init__(self, result: LossSummary) -> None:
        self.result, self.calls = result, 0

    def __call__(self) -> LossSummary:
        self.calls += 1
        return self.result


def test_loss_cache_returns_the_measured_loss_exactly(tmp_path: Path):
    cache, measure = LossCache(tmp_path / "losses"), Measurement(around(1 / 3, 1e-9))
    first, second = cache.get(KEY, measure), LossCache(tmp_path / "losses").get(KEY, measure)
    assert (first, second, measure.calls) == (measure.result, measure.result, 1)
    cache.get({**KEY, "timesteps": [1, 3]}, measure)
    cache.get({**KEY, "weights": None}, measure)
    assert measure.calls == 3


def test_loss_cache_unreadable_file_is_measured_again(tmp_path: Path):
    cache, measure = LossCache(tmp_path), Measurement(around(0.5))
    cache.get(KEY, measure)
    (stored,) = tmp_path.iterdir()
    stored.write_text(stored.read_text()[:20])
    assert cache.get(KEY, measure) == measure.result
    assert (measure.calls, LossSummary.model_validate_json(stored.read_text())) == (2, measure.result)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_cache_loss_that_is_not_finite_is_not_stored(tmp_path: Path, value: float):
    measure = Measurement(around(value))
    LossCache(tmp_path).get(KEY, measure)
    assert not list(tmp_path.iterdir())
    assert not ModelLosses(around(0.1), measure.result).is_finite
    assert ModelLosses(around(0.1), None).is_finite


def test_compared_pairs_every_checkpoint_with_base_and_best_of_the_selectable_weights():
    def weights(step: int, kind: str) -> CheckpointWeights:
        values = {"step": step, "weights": kind, "epochs": 1, "samples": 1, "path": "w", "sha256": "a"}
        return CheckpointWeights.model_validate(values | {"is_final": False})

    base = ModelLosses(around(0.5), around(0.5))
    losses = {
        weights(1, "ema"): ModelLosses(around(0.1), around(0.1)),
        weights(1, "trained"): ModelLosses(around(0.3), around(0.2)),
        weights(2, "trained"): ModelLosses(around(0.4), None),
    }
    series = CheckpointSeries(base, losses, ())
    rows = series.compared("trained", held_out=True)
    assert [(row.step, row.weights) for row in rows] == [(1, "ema"), (1, "trained"), (2, "trained")]
    assert [round(row.to_base.mean, 6) for row in rows] == [-0.4, -0.2, -0.1]
    assert [row.to_best and round(row.to_best.mean, 6) for row in rows] == [-0.2, 0.0, 0.1]
    assert [row.gap and round(row.gap.mean, 6) for row in rows] == [0.0, 0.1, None]
    assert {row.to_best for row in series.compared("trained", held_out=False)} == {None}
