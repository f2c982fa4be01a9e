"""The history of a project's evaluations."""

from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sdxl_pipeline.evaluation.history import (
    HISTORY_FILE,
    NOT_PUSHED,
    mark_released,
    read_history,
    record_evaluation,
)
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    Cmmd,
    LossSummary,
    Memorisation,
    PairedDifference,
    ProbeGap,
    ScorePair,
    Scores,
)
from tests.evaluation.test_report import make_report

DATE = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def report(folder: Path, index: int = 0, **changes: object):
    return make_report(
        folder, **{"identity": f"{index:064x}", "run_identity": "a" * 64, "step": 40} | changes
    )


def test_record_evaluation_appends_a_row_with_losses_scores_and_verdict(tmp_path):
    difference = PairedDifference(images=5, mean=-0.3, standard_error=0.01)
    gap = ProbeGap(mean=0.02, standard_error=0.005)
    loss = LossSummary(mean=0.1, by_timestep=())
    checkpoints = tuple(
        CheckpointLoss(
            step=step,
            weights="trained",
            sha256="0",
            held_out=loss,
            probe=loss,
            to_base=difference,
            gap=gap if step == 40 else None,
        )
        for step in (20, 40)
    )
    pair = ScorePair(base=0.3, lora=0.6, difference=difference)
    cmmd = Cmmd(value=12.5, images=(16, 40), status="uncertain", text="uncertain")
    memorised = Memorisation(
        samples=16, flagged=4, limit=0.1, calibrated_on=40, pairs=(), sheet_path=None, text=""
    )
    written = report(
        tmp_path,
        difference_to_base=difference,
        checkpoints=checkpoints,
        scores=Scores(fidelity=pair, cmmd_lora=cmmd),
        memorisation=memorised,
    )
    rows = record_evaluation(tmp_path, written, ["not_memorised"], DATE)
    assert rows == read_history(tmp_path)
    (row,) = rows
    assert (row.identity, row.run_identity, row.step) == (written.identity, "a" * 64, 40)
    assert row.date == "2026-03-01T12:30:00+00:00"
    assert (row.base_loss, row.lora_loss) == (written.base_loss.mean, written.lora_loss.mean)
    assert (row.difference, row.gap) == (difference, gap)
    assert row.scores == {"fidelity": 0.6, "cmmd": 12.5, "memorised": 0.25}
    assert (row.verdict, row.released, row.differs) == (("not_memorised",), None, ())


def test_record_evaluation_repeated_replaces_only_the_verdict(tmp_path):
    record_evaluation(tmp_path, report(tmp_path, 0), ["images_valid"], DATE)
    record_evaluation(tmp_path, report(tmp_path, 1, step=20), [], DATE)
    before = mark_released(tmp_path, report(tmp_path, 0).identity, "r-0123456789ab")
    after = record_evaluation(tmp_path, report(tmp_path, 0), [])
    assert after == [before[0].model_copy(update={"verdict": ()}), before[1]]
    assert after[0].released == "r-0123456789ab"
    assert after[1].differs == ("step: 40 -> 20",)


def test_mark_released_without_a_tag_records_not_pushed(tmp_path):
    record_evaluation(tmp_path, report(tmp_path), [], DATE)
    (row,) = mark_released(tmp_path, report(tmp_path).identity, None)
    assert row.released == NOT_PUSHED
    assert mark_released(tmp_path, "f" * 64, "r-1") == [row]


def test_record_evaluation_of_a_deleted_run_has_unknown_changes(tmp_path):
    record_evaluation(tmp_path, report(tmp_path, 0), [], DATE)
    rows = record_evaluation(tmp_path, report(tmp_path, 1, run_identity="b" * 64), [], DATE)
    assert rows[1].differs == ("unknown: the folder of one of the runs was deleted",)


@pytest.mark.parametrize("line", ["", '{"identity": "cut off', '{"other": 1}'])
def test_read_history_leaves_out_unreadable_rows(tmp_path, line):
    rows = record_evaluation(tmp_path, report(tmp_path), [], DATE)
    with (tmp_path / HISTORY_FILE).open("a") as file:
        file.write(line + "\n")
    assert read_history(tmp_path) == rows


def _record(folder: Path, index: int) -> None:
    record_evaluation(folder, report(folder, index), [])


def test_record_evaluation_by_several_processes_loses_no_row(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        list(pool.map(_record, [tmp_path] * 8, range(8)))
    assert {row.identity for row in read_history(tmp_path)} == {f"{index:064x}" for index in range(8)}
