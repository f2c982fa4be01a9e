"""`sdxl-pipeline runs`: the finished runs of a project with their evaluations, and the comparison of two of them."""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdxl_pipeline.cli.select_project import select_project

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from sdxl_pipeline.runtime.evaluation_report import HistoryRow
    from sdxl_pipeline.runtime.specs import TrainedLora


_COLUMNS: Final = (
    "date", "run", "step", "base", "LoRA", "difference", "gap", "scores", "failed checks", "released", "changes",
)  # fmt: skip
_FOLDED: Final = ("scores", "failed checks", "changes")


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "runs",
        help="list a project's runs and evaluations, and compare two runs",
        description="List the finished runs of a project with every evaluation: losses, scores, failed checks and release.",
    )
    parser.add_argument(
        "project", nargs="?", default="demo", help="name or folder of the project (default: demo)"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN", "RUN"),
        help="write a plot of the losses of two runs by step, and list what differs; at least 8 characters of each identity",
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="file of the plot (default: in the output folder)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """List or compare the runs; return 1 if the project or a run does not exist."""
    from sdxl_pipeline.evaluation.history import read_history
    from sdxl_pipeline.runtime.stage_runner import UserError
    from sdxl_pipeline.training.checkpoint.finished_runs import list_runs

    project = select_project(options.project, console)
    if project is None:
        return 1
    output_dir = Path(project.training.output_dir)
    if options.compare:
        try:
            _compare(output_dir, options.compare, options.output, console)
        except UserError as error:
            console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
            return 1
        return 0
    runs, history = list_runs(output_dir), read_history(output_dir)
    if options.json:
        console.print_json(json.dumps(_as_json(runs, history)))
    elif runs or history:
        _print_rows(_rows(runs, history), console)
    else:
        console.print(f"{project.name} has no finished run yet: materialize lora.", soft_wrap=True)
    return 0


def _as_json(runs: "Sequence[TrainedLora]", history: "Sequence[HistoryRow]") -> list[dict[str, Any]]:
    """Return every run that is finished or was evaluated, with its evaluations."""
    finished = {run.identity: run for run in runs}
    identities = dict.fromkeys([*finished, *(row.run_identity for row in history)])
    return [
        {
            "run": identity,
            "folder": manifest.run_dir if (manifest := finished.get(identity)) else None,
            "steps": manifest.steps if manifest else None,
            "finished": _finished_at(manifest) if manifest else None,
            "evaluations": [row.model_dump(mode="json") for row in history if row.run_identity == identity],
        }
        for identity in identities
    ]


def _rows(runs: "Sequence[TrainedLora]", history: "Sequence[HistoryRow]") -> list[tuple[str, ...]]:
    """Return the cells of a row per evaluation, and of one per run that was never evaluated, by date."""
    evaluated = {row.run_identity for row in history}
    rows = [(row.date, _evaluation_cells(row)) for row in history]
    rows += [(_finished_at(run), _run_cells(run)) for run in runs if run.identity not in evaluated]
    return [(date[:16].replace("T", " "), *cells) for date, cells in sorted(rows)]


def _print_rows(rows: Sequence[Sequence[str]], console: Console) -> None:
    """Print a table, or in a terminal that is too narrow for one, each row as a list of its values."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for name in _COLUMNS:
        folded = name in _FOLDED
        table.add_column(name, no_wrap=not folded, overflow="fold", min_width=18 if folded else None)
    for row in rows:
        table.add_row(*map(escape, row))
    if table.__rich_measure__(console, console.options).minimum <= console.width:
        console.print(table)
        return
    for row in rows:
        console.print(f"{row[0]}  {escape(row[1])}", soft_wrap=True)
        for name, cell in zip(_COLUMNS[2:], row[2:], strict=True):
            if cell:
                console.print(f"  {name}: {escape(cell)}", soft_wrap=True)


def _evaluation_cells(row: "HistoryRow") -> tuple[str, ...]:
    difference, gap = (
        "" if value is None else f"{value.mean:+.4f}" + _error(value.standard_error)
        for value in (row.difference, row.gap)
    )
    return (
        row.run_identity[:16],
        str(row.step),
        "" if row.base_loss is None else f"{row.base_loss:.4f}",
        "" if row.lora_loss is None else f"{row.lora_loss:.4f}",
        difference,
        gap,
        ", ".join(f"{name} {value:.3g}" for name, value in row.scores.items()),
        ", ".join(row.verdict) or "none",
        row.released or "",
        "; ".join(row.differs),
    )


def _error(error: float | None) -> str:
    return "" if error is None else f" ± {error:.4f}"


def _run_cells(run: "TrainedLora") -> tuple[str, ...]:
    return (run.identity[:16], str(run.steps), "", "", "", "", "", "not evaluated", "", "")


def _finished_at(run: "TrainedLora") -> str:
    from sdxl_pipeline.training.checkpoint.finished_runs import FINISHED

    changed = (Path(run.run_dir) / FINISHED).stat().st_mtime
    return datetime.fromtimestamp(changed, UTC).isoformat(timespec="seconds")


def _compare(output_dir: Path, prefixes: Sequence[str], output: Path | None, console: Console) -> None:
    """Write the plot of two runs and print what makes their weights differ."""
    from sdxl_pipeline.training.checkpoint.finished_runs import find_run
    from sdxl_pipeline.training.checkpoint.run_differences import differences
    from sdxl_pipeline.training.checkpoint.run_identity import read_spec
    from sdxl_pipeline.training.logging.loss_plot import RunCurves, plot_runs
    from sdxl_pipeline.training.logging.run_logs import METRICS_FILE, read_metrics

    runs = [find_run(output_dir, prefix) for prefix in prefixes]
    names = [run.identity[:8] for run in runs]
    path = output or output_dir / f"runs_{'_'.join(names)}.png"
    first, second = (
        RunCurves(name, read_metrics(Path(run.run_dir) / METRICS_FILE), run.eval_losses)
        for name, run in zip(names, runs, strict=True)
    )
    plot_runs(first, second, path)
    console.print(f"{escape(str(path))}", soft_wrap=True)
    before, after = (read_spec(Path(run.run_dir)) for run in runs)
    if before is None or after is None:
        console.print("What differs is unknown: the spec of one of the runs is missing.")
        return
    for change in differences(before, after) or ["Nothing that changes the weights differs."]:
        console.print(f"  {escape(change)}", soft_wrap=True)
