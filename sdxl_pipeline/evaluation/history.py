"""The history of a project's evaluations: `<output_dir>/evaluations.jsonl`, a row per evaluated checkpoint, the earliest first. No torch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from filelock import FileLock
from pydantic import ValidationError

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport, HistoryRow, ProbeGap
from sdxl_pipeline.training.checkpoint.finished_runs import RUNS
from sdxl_pipeline.training.checkpoint.run_differences import differences
from sdxl_pipeline.training.checkpoint.run_identity import read_spec

HISTORY_FILE: Final = "evaluations.jsonl"
NOT_PUSHED: Final = "not pushed"
"""`HistoryRow.released` of a release whose folder was not uploaded."""

_PAIRED_SCORES: Final = ("clip", "fidelity", "diversity")


def read_history(output_dir: Path) -> list[HistoryRow]:
    """Return the rows of a project; none without a file. Rows of another version, and one cut off by a crash, are left out."""
    path = output_dir / HISTORY_FILE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(HistoryRow.model_validate_json(line))
        except ValidationError:
            continue
    return rows


def record_evaluation(
    output_dir: Path, report: EvaluationReport, verdict: Sequence[str], date: datetime | None = None
) -> list[HistoryRow]:
    """Add an evaluation, with the names of its failed checks as the verdict, and return all rows.

    A repeated evaluation keeps its place, date and release: only its verdict, which depends on settings too, is replaced.
    """

    def change(rows: list[HistoryRow]) -> list[HistoryRow]:
        if any(row.identity == report.identity for row in rows):
            return [
                row.model_copy(update={"verdict": tuple(verdict)}) if row.identity == report.identity else row
                for row in rows
            ]
        row = HistoryRow(
            identity=report.identity,
            run_identity=report.run_identity,
            date=(date or datetime.now(UTC)).isoformat(timespec="seconds"),
            step=report.step,
            differs=_differences_to(rows[-1], report, output_dir) if rows else (),
            base_loss=report.base_loss and report.base_loss.mean,
            lora_loss=report.lora_loss and report.lora_loss.mean,
            difference=report.difference_to_base,
            gap=_selected_gap(report),
            scores=_scores(report),
            verdict=tuple(verdict),
        )
        return [*rows, row]

    return _rewrite(output_dir, change)


def mark_released(output_dir: Path, identity: str, tag: str | None) -> list[HistoryRow]:
    """Record that the evaluation `identity` was released, under a tag if it was pushed, and return all rows."""

    def change(rows: list[HistoryRow]) -> list[HistoryRow]:
        released = {"released": tag or NOT_PUSHED}
        return [row.model_copy(update=released) if row.identity == identity else row for row in rows]

    return _rewrite(output_dir, change)


def _rewrite(output_dir: Path, change: Callable[[list[HistoryRow]], list[HistoryRow]]) -> list[HistoryRow]:
    with _locked(output_dir):
        rows = change(read_history(output_dir))
        write_text_atomic(output_dir / HISTORY_FILE, "".join(row.model_dump_json() + "\n" for row in rows))
    return rows


@contextmanager
def _locked(output_dir: Path) -> Iterator[None]:
    output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(output_dir / f".{HISTORY_FILE}.lock"):
        yield


def _differences_to(previous: HistoryRow, report: EvaluationReport, output_dir: Path) -> tuple[str, ...]:
    """Return what the run of `report` changes against that of the previous row; for the same run, the step if it is another one."""
    if previous.run_identity == report.run_identity:
        return () if previous.step == report.step else (f"step: {previous.step} -> {report.step}",)
    before, after = (
        read_spec(output_dir / RUNS / identity[:16])
        for identity in (previous.run_identity, report.run_identity)
    )
    if before is None or after is None:
        return ("unknown: the folder of one of the runs was deleted",)
    return tuple(differences(before, after))


def _selected_gap(report: EvaluationReport) -> ProbeGap | None:
    selected = (report.step, report.weights)
    return next((each.gap for each in report.checkpoints if (each.step, each.weights) == selected), None)


def _scores(report: EvaluationReport) -> dict[str, float]:
    """Return the selected checkpoint's scores by name, without those that were not measured."""
    scores: dict[str, float | None] = {}
    if report.scores is not None:
        for name in _PAIRED_SCORES:
            pair = getattr(report.scores, name)
            scores[name] = pair and pair.lora
        cmmd = report.scores.cmmd_lora
        scores["cmmd"] = cmmd.value if cmmd else None
    elif report.lora_clip is not None:
        scores["clip"] = report.lora_clip.mean
    if report.memorisation is not None:
        scores["memorised"] = report.memorisation.share
    return {name: value for name, value in scores.items() if value is not None}
