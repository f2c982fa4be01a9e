"""The console script `sdxl-pipeline`: what the settings of a project come to, what they may be, and what is left over.

Torch is never imported here: a doctor must answer at once, and also where the installation is what is ill.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware, HardwareError, hardware_from_name
from sdxl_pipeline.config.loader import (
    CONFIG_FILE,
    DATASETS_FILE,
    InvalidProject,
    Project,
    discover_projects,
    load_project,
    projects_folder,
)
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_settings
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_page import settings_page
from sdxl_pipeline.data.sources.remote_names import bucket_url, missing_extra
from sdxl_pipeline.files.storage_layout import ROOT_VARIABLE, storage_root

if TYPE_CHECKING:
    from sdxl_pipeline.cache.prune import PruneReport


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 1 when something has to be put right."""
    parser = argparse.ArgumentParser(
        prog="sdxl-pipeline", description="Fine-tune SDXL as a graph of data assets."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check projects and show each setting's value and where it came from",
        description="Check projects and show each setting's value and where it came from: config.json, profile or default.",
    )
    doctor.add_argument(
        "projects", nargs="*", metavar="project", help="name or folder of a project; all when none is given"
    )
    doctor.add_argument(
        "--hardware",
        default=os.environ.get("SDXL_HARDWARE") or "auto",
        metavar="PROFILE",
        help=f"hardware profile: auto, {', '.join(PRESETS)} (default: SDXL_HARDWARE, else auto)",
    )
    doctor.add_argument(
        "--set-only", action="store_true", help="leave out settings that are at their default"
    )
    commands.add_parser("settings", help="print the page of every accepted key (docs/settings.md)")
    prune = commands.add_parser(
        "prune",
        help="free what no project refers to",
        description="Show what no project refers to in stores, work folders and downloads, and free it when that is confirmed.",
    )
    prune.add_argument(
        "--storage",
        metavar="FOLDER",
        help=f"the storage's root (default: {ROOT_VARIABLE}, else `storage` in the repository)",
    )
    prune.add_argument(
        "--verify",
        action="store_true",
        help="read every cached latent and embedding and compare it with its checksum; damaged ones are encoded again by the next run",
    )
    answer = prune.add_mutually_exclusive_group()
    answer.add_argument("--dry-run", action="store_true", help="only show what would be freed")
    answer.add_argument("--yes", action="store_true", help="free it without asking")
    options = parser.parse_args(arguments)
    if options.command == "settings":
        sys.stdout.write(settings_page())
        return 0
    if options.command == "prune":
        return _prune(options.storage, options.dry_run, options.yes, options.verify, Console(highlight=False))
    return _doctor(options.projects, options.hardware, options.set_only, Console(highlight=False))


def _prune(storage: str | None, dry_run: bool, yes: bool, verify: bool, console: Console) -> int:
    from sdxl_pipeline.cache.prune import prune
    from sdxl_pipeline.cache.references import PruneError

    root, projects = storage_root(storage), projects_folder()
    try:
        with _verification(console) if verify else nullcontext() as on_progress:
            foreseen = prune(root, projects, dry_run=True, verify=verify, on_progress=on_progress)
        _show_prune(foreseen, root, console)
        if dry_run or not foreseen.freed:
            return 0
        if not yes:
            if not sys.stdin.isatty():
                console.print("Nothing was freed: nobody is there to ask. Add --yes to free it.")
                return 1
            if console.input("Free it? \\[y/N] ").strip().lower() not in ("y", "yes"):
                console.print("Nothing was freed.")
                return 1
        done = prune(root, projects, verify=verify)
    except PruneError as error:
        console.print(f"[bold red]Nothing is freed: {escape(str(error))}[/]", soft_wrap=True)
        return 1
    console.print(f"Freed {decimal(done.bytes)}.")
    return 0


@contextmanager
def _verification(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of reading all entries of each store."""
    with Progress(console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            task = tasks.get(what)
            if task is None:
                task = tasks[what] = progress.add_task(escape(what), total=total)
            progress.update(task, completed=done)

        yield report


def _show_prune(report: "PruneReport", root: Path, console: Console) -> None:
    """What a prune would free, and what it keeps against expectation."""
    console.print(escape(str(root)), style="dim", soft_wrap=True)
    for note in report.notes:
        console.print(f"[yellow]kept[/] {escape(note)}", soft_wrap=True)
    if not report.freed:
        console.print("Nothing to free: all that is there is referred to, in use, or younger than an hour.")
        return
    table = Table("what", "where", box=SIMPLE_HEAD, show_footer=True)
    table.add_column("count", justify="right")
    table.add_column("size", justify="right", footer=decimal(report.bytes))
    for item in report.freed:
        table.add_row(item.what, escape(str(item.where)), f"{item.count:,}", decimal(item.bytes))
    console.print(table)


def _doctor(names: Sequence[str], hardware_name: str, set_only: bool, console: Console) -> int:
    try:
        hardware = hardware_from_name(hardware_name)
    except HardwareError as error:
        console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
        return 1
    projects, healthy = _named_projects(names, console) if names else (discover_projects(), True)
    if not projects and not names:
        console.print(
            "No projects found: a project is a folder with a config.json and a multidatabackend.json."
        )
        return 1
    for project in projects:
        healthy = _examine(project, hardware, set_only, console) and healthy
    return 0 if healthy else 1


def _named_projects(names: Sequence[str], console: Console) -> tuple[list[Project | InvalidProject], bool]:
    """The projects by these names or in these folders, and whether each name was one."""
    found: list[Project | InvalidProject] = []
    all_known = True
    for name in names:
        folder = Path(name)
        if any((folder / file).exists() for file in (CONFIG_FILE, DATASETS_FILE)):
            try:
                found.append(load_project(folder))
            except ProjectError as error:
                found.append(InvalidProject(folder.resolve().name, folder, error))
            continue
        discovered = discover_projects()
        matching = [project for project in discovered if name in (project.name, project.folder.name)]
        if not matching:
            known = ", ".join(project.name for project in discovered) or "none"
            console.print(
                f"[bold red]{escape(name)} is neither a project folder nor a project; there are: {escape(known)}[/]"
            )
            all_known = False
        found += matching
    return found, all_known


def _examine(project: Project | InvalidProject, hardware: Hardware, set_only: bool, console: Console) -> bool:
    """Show one project; whether it can be trained as it stands."""
    console.rule(f"[bold]{escape(project.name)}[/]", align="left")
    console.print(escape(str(project.folder)), style="dim", soft_wrap=True)
    if isinstance(project, InvalidProject):
        return _show_error(project.error, console)
    try:
        settings, sources = resolve_settings(project.training, hardware, {}, project.folder)
    except ProjectError as error:
        return _show_error(error, console)
    from sdxl_pipeline.data.scan.folder_notes import local_notes

    for warning in project.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)
    for dataset in (*project.datasets, *project.mask_datasets):
        if lack := _lack(dataset):
            console.print(f"[yellow]warning[/] {escape(dataset.id)}: {escape(lack)}", soft_wrap=True)
        for note in local_notes(dataset):
            console.print(f"[yellow]warning[/] {escape(dataset.id)}: {escape(note)}", soft_wrap=True)
    console.print(_datasets_table(project))
    console.print(_settings_table(settings, sources, hardware, set_only))
    return True


def _lack(dataset: ImageDataset) -> str:
    """What the source of a dataset still lacks on this machine; empty when nothing does."""
    if dataset.type == "local" and dataset.instance_data_dir and not dataset.instance_data_dir.is_dir():
        return f"no images yet, {dataset.instance_data_dir} does not exist"
    if dataset.type == "csv" and dataset.csv_file and not dataset.csv_file.is_file():
        return f"no list yet, {dataset.csv_file} does not exist"
    return missing_extra(bucket_url(dataset)) if dataset.type == "aws" else ""


def _settings_table(
    settings: TrainingSettings, sources: Mapping[str, str], hardware: Hardware, set_only: bool
) -> Table:
    table = Table(title=f"{CONFIG_FILE}, on {hardware.profile}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("setting", overflow="fold")
    table.add_column("value", overflow="fold")
    table.add_column("from", no_wrap=True)
    for key, source in sources.items():
        if not (set_only and source == "default"):
            style = "dim" if source == "default" else ""
            table.add_row(key, escape(_shown(getattr(settings, key))), source, style=style)
    return table


def _show_error(error: ProjectError, console: Console) -> bool:
    console.print(f"[red]{escape(str(error))}[/]", soft_wrap=True)
    return False


def _datasets_table(project: Project) -> Table:
    table = Table(
        "dataset",
        "use",
        "source",
        "size",
        "crop",
        "captions",
        "repeats",
        title=DATASETS_FILE,
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for dataset in project.datasets:
        use = "train" if dataset.dataset_type == "image" else "eval"
        if dataset.is_regularisation_data:
            use = "preserve"
        if dataset.conditioning_data is not None:
            use += f", masked by {escape(dataset.conditioning_data)}"
        captions = dataset.caption_strategy
        table.add_row(
            escape(dataset.id),
            use,
            dataset.type,
            _size(dataset),
            _crop(dataset),
            captions,
            str(dataset.repeats),
        )
    for dataset in project.mask_datasets:
        table.add_row(escape(dataset.id), dataset.conditioning_type, dataset.type, "", "", "", "")
    return table


def _size(dataset: ImageDataset) -> str:
    unit = {"area": "MP", "pixel_area": "px squared", "pixel": "px shorter edge"}
    return f"{dataset.resolution:g} {unit[dataset.resolution_type]}"


def _crop(dataset: ImageDataset) -> str:
    return f"{dataset.crop_style} {dataset.crop_aspect}" if dataset.crop else "to the bucket"


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_shown(item)}" for key, item in value.items()) or "none"
    return str(value) if value != "" else '""'


if __name__ == "__main__":
    sys.exit(main())
