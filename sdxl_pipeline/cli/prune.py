"""`sdxl-pipeline prune`: delete what no project refers to."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from sdxl_pipeline.config.loader import projects_folder
from sdxl_pipeline.files.storage_layout import ROOT_VARIABLE, storage_root

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from sdxl_pipeline.cache.prune import PruneReport


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "prune",
        help="free what no project refers to",
        description="Show what no project refers to in stores, work folders and downloads, and free it after confirmation.",
    )
    parser.add_argument(
        "--storage",
        metavar="FOLDER",
        help=f"the storage's root (default: {ROOT_VARIABLE}, else `storage` in the repository)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every cached latent and embedding and verify its checksum; corrupt ones are encoded again by the next run",
    )
    answer = parser.add_mutually_exclusive_group()
    answer.add_argument("--dry-run", action="store_true", help="only show what would be freed")
    answer.add_argument("--yes", action="store_true", help="free it without confirmation")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Show what can be freed and free it after confirmation; return 1 if nothing was freed although something could be."""
    from sdxl_pipeline.cache.prune import prune
    from sdxl_pipeline.cache.references import PruneError

    root, projects = storage_root(options.storage), projects_folder()
    try:
        with _verification_progress(console) if options.verify else nullcontext() as on_progress:
            preview = prune(root, projects, dry_run=True, verify=options.verify, on_progress=on_progress)
        _show_report(preview, root, console)
        if options.dry_run or not preview.freed:
            return 0
        if not options.yes:
            if not sys.stdin.isatty():
                console.print("Nothing was freed: the terminal is not interactive. Add --yes to free it.")
                return 1
            if console.input("Free it? \\[y/N] ").strip().lower() not in ("y", "yes"):
                console.print("Nothing was freed.")
                return 1
        report = prune(root, projects, verify=options.verify)
    except PruneError as error:
        console.print(f"[bold red]Nothing is freed: {escape(str(error))}[/]", soft_wrap=True)
        return 1
    console.print(f"Freed {decimal(report.bytes)}.")
    return 0


@contextmanager
def _verification_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of reading all entries of each store."""
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(store: str, done: int, total: int) -> None:
            task = tasks.get(store)
            if task is None:
                task = tasks[store] = progress.add_task(escape(store), total=total)
            progress.update(task, completed=done)

        yield report


def _show_report(report: "PruneReport", root: Path, console: Console) -> None:
    """Show what a prune would free, and notes on what it does not free."""
    console.print(escape(str(root)), style="dim", soft_wrap=True)
    for note in report.notes:
        console.print(f"[yellow]kept[/] {escape(note)}", soft_wrap=True)
    if not report.freed:
        console.print("Nothing to free: everything is referred to, in use, or younger than an hour.")
        return
    table = Table("what", "where", box=SIMPLE_HEAD, show_footer=True)
    table.add_column("count", justify="right")
    table.add_column("size", justify="right", footer=decimal(report.bytes))
    for item in report.freed:
        table.add_row(item.what, escape(str(item.where)), f"{item.count:,}", decimal(item.bytes))
    console.print(table)
