"""What a benchmark prints: figures with what they are held against, as one table."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """One measured value. `target` is what it is held against, in words ("at least 0.9"); `met` whether it holds, None without one."""

    part: str
    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Options:
    """What every part is told. `quick` takes a small amount of work, to see that the part runs; its figures mean nothing."""

    workdir: str
    quick: bool = False
    repeats: int = 5


def show(figures: Sequence[Measurement]) -> None:
    """Print the figures, and the machine they were measured on; without rich, which a GPU's machine may lack, a line for each."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for figure in figures:
            print(f"{figure.part} | {figure.name} | {figure.value:,.4g} {figure.unit} | {figure.note}")
        return
    table = Table("part", "figure", "value", "unit", "target", "", "note")
    for figure in figures:
        verdict = "" if figure.met is None else "met" if figure.met else "MISSED"
        table.add_row(
            figure.part, figure.name, f"{figure.value:,.4g}", figure.unit, figure.target, verdict, figure.note
        )
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    )


def as_json(figures: Sequence[Measurement]) -> str:
    """The figures as a JSON list."""
    return json.dumps([asdict(figure) for figure in figures], indent=1)
