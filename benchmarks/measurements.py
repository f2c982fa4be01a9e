"""Measurements with their targets, printed as one table or written as JSON."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """One measured value. `target` is in words ("at least 0.9"); `met` is whether it is reached, None without a target."""

    part: str
    name: str
    value: float
    unit: str
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Options:
    """Options of every part. `quick` does little work, to test that the part runs; its values mean nothing."""

    workdir: str
    quick: bool = False
    repeats: int = 5


def show(measurements: Sequence[Measurement]) -> None:
    """Print the measurements and the machine as a table; without rich, which a GPU machine may lack, one line for each."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ModuleNotFoundError:
        for each in measurements:
            print(f"{each.part} | {each.name} | {each.value:,.4g} {each.unit} | {each.note}")
        return
    table = Table("part", "metric", "value", "unit", "target", "", "note")
    for each in measurements:
        outcome = "" if each.met is None else "met" if each.met else "MISSED"
        table.add_row(each.part, each.name, f"{each.value:,.4g}", each.unit, each.target, outcome, each.note)
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    )


def as_json(measurements: Sequence[Measurement]) -> str:
    """Return the measurements as a JSON list."""
    return json.dumps([asdict(each) for each in measurements], indent=1)
