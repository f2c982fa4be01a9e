"""Early stopping decides by the rows of eval_loss.jsonl alone."""

import math
from pathlib import Path

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.runtime.specs import Ancestor, EarlyStop, RunLineage
from sdxl_pipeline.training.checkpoint.run_identity import write_lineage
from sdxl_pipeline.training.logging.run_logs import EvalRow, eval_loss_log
from sdxl_pipeline.training.validation.early_stopping import Decision, decide, decide_for_run

NAN = math.nan


def rows_of(*losses: float, first: int = 10) -> list[EvalRow]:
    """Return rows of the steps 10, 20, ... with these mean losses."""
    return [
        EvalRow(step=first + 10 * index, loss=LossSummary(mean=loss, by_timestep=((500, loss),)))
        for index, loss in enumerate(losses)
    ]


@pytest.mark.parametrize(
    ("losses", "min_delta", "best_step", "stops"),
    [
        ((), 0.0, None, False),
        ((5.0,), 0.0, 10, False),
        ((5.0, 4.0, 3.0, 2.0), 0.0, 40, False),
        ((5.0, 6.0), 0.0, 10, False),
        ((5.0, 6.0, 7.0), 0.0, 10, True),
        ((5.0, 5.0, 5.0), 0.0, 10, True),
        ((5.0, 6.0, 4.0, 6.0), 0.0, 30, False),
        ((5.0, 6.0, 4.0, 6.0, 5.0), 0.0, 30, True),
        ((5.0, 4.9, 4.8), 0.5, 10, True),
        ((5.0, 4.7, 4.4), 0.5, 30, False),  # together more than min_delta
        ((5.0, NAN, NAN), 0.0, 10, True),
        ((NAN, 5.0, NAN), 0.0, 20, False),
        ((5.0, -math.inf, math.inf), 0.0, 10, True),
        ((NAN, NAN, NAN, NAN), 0.0, None, False),
    ],
)
def test_decide_stops_after_patience_evaluations_without_improvement(losses, min_delta, best_step, stops):
    rows = rows_of(*losses)
    step = rows[-1].step if rows else 0
    decision = decide(rows, patience=2, min_delta=min_delta, step=step)
    assert decision.best_step == best_step
    assert (decision.stop is not None) is stops
    if decision.stop is not None:
        best_loss = next(row.loss.mean for row in rows if row.step == best_step)
        assert decision.stop == EarlyStop(step=step, best_step=best_step, best_loss=best_loss, patience=2)


def test_decide_step_after_the_last_evaluation_does_not_stop():
    rows = rows_of(5.0, 6.0, 7.0)
    assert decide(rows, 2, 0.0, step=30).stop is not None
    assert decide(rows, 2, 0.0, step=31) == Decision(10, None)


@pytest.fixture
def settings() -> TrainingSettings:
    return TrainingSettings(early_stopping_patience=2, eval_steps_interval=10)


def write_run(run_dir: Path, rows: list[EvalRow], ancestor: Ancestor | None = None) -> None:
    lineage = RunLineage(
        identity="me", trajectory="same", any_length="x", optimizer="adamw", ancestor=ancestor
    )
    run_dir.mkdir(exist_ok=True)
    write_lineage(run_dir, lineage)
    eval_loss_log(run_dir, 1000).append(rows)


def is_due(step: int) -> bool:
    return step % 10 == 0


def test_decide_for_run_counts_no_base_model_and_no_later_or_undue_rows(tmp_path, settings):
    base, undue = rows_of(0.1, first=0), rows_of(0.1, first=25)
    first, second, third, fourth = rows_of(5.0, 6.0, 7.0, 1.0)
    write_run(tmp_path, [*base, first, second, *undue, third, fourth])
    decisions = [decide_for_run(tmp_path, settings, step, is_due) for step in (10, 20, 25, 30, 40)]
    assert [decision.best_step for decision in decisions] == [10, 10, 10, 10, 40]
    assert [decision.stop is not None for decision in decisions] == [False, False, False, True, False]
    off = TrainingSettings(eval_steps_interval=10)
    assert decide_for_run(tmp_path, off, 30, is_due) == Decision(None, None)


@pytest.mark.parametrize(("same_trajectory", "best_step"), [(True, 20), (False, 40)])
def test_decide_for_run_counts_rows_of_an_ancestor_only_of_the_same_trajectory(
    tmp_path, settings, same_trajectory, best_step
):
    ancestor = Ancestor(identity="it", step=30, same_trajectory=same_trajectory, takes_optimizer=True)
    write_run(tmp_path, rows_of(5.0, 1.0, 2.0, 3.0, 4.0), ancestor)
    assert decide_for_run(tmp_path, settings, 50, is_due).best_step == best_step
    assert (decide_for_run(tmp_path, settings, 50, is_due).stop is not None) is same_trajectory
