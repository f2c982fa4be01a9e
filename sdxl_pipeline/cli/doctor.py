"""`sdxl-pipeline doctor`: validate projects and show each setting's value and its source."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sdxl_pipeline.config.hardware_profiles import PRESETS, Hardware, HardwareError, hardware_from_name
from sdxl_pipeline.config.loader import (
    CONFIG_FILE,
    DATASETS_FILE,
    InvalidProject,
    Project,
    discover_projects,
    load_project,
)
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_settings
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.sources.remote_names import bucket_url, missing_extra

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="validate projects and show each setting's value and its source",
        description="Validate projects and show each setting's value and its source: config.json, profile or default.",
    )
    parser.add_argument(
        "projects", nargs="*", metavar="project", help="name or folder of a project; all if none is given"
    )
    parser.add_argument(
        "--hardware",
        default=os.environ.get("SDXL_HARDWARE") or "auto",
        metavar="PROFILE",
        help=f"hardware profile: auto, {', '.join(PRESETS)} (default: SDXL_HARDWARE, else auto)",
    )
    parser.add_argument("--set-only", action="store_true", help="leave out settings with their default value")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Show the projects; return 1 if one of them is invalid or unknown, or there is none."""
    try:
        hardware = hardware_from_name(options.hardware)
    except HardwareError as error:
        console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
        return 1
    names = options.projects
    projects, valid = _select_projects(names, console) if names else (discover_projects(), True)
    if not projects and not names:
        console.print(
            "No projects found: a project is a folder with a config.json and a multidatabackend.json."
        )
        return 1
    for project in projects:
        valid = _show_project(project, hardware, options.set_only, console) and valid
    return 0 if valid else 1


def _select_projects(names: Sequence[str], console: Console) -> tuple[list[Project | InvalidProject], bool]:
    """Return the projects with these names or in these folders, and whether every name was found."""
    selected: list[Project | InvalidProject] = []
    all_known = True
    for name in names:
        folder = Path(name)
        if any((folder / file).exists() for file in (CONFIG_FILE, DATASETS_FILE)):
            try:
                selected.append(load_project(folder))
            except ProjectError as error:
                selected.append(InvalidProject(folder.resolve().name, folder, error))
            continue
        discovered = discover_projects()
        matching = [project for project in discovered if name in (project.name, project.folder.name)]
        if not matching:
            known = ", ".join(project.name for project in discovered) or "none"
            console.print(
                f"[bold red]{escape(name)} is neither a project folder nor the name of a project; there are: {escape(known)}[/]"
            )
            all_known = False
        selected += matching
    return selected, all_known


def _show_project(
    project: Project | InvalidProject, hardware: Hardware, set_only: bool, console: Console
) -> bool:
    """Show one project and return whether its settings are valid on this hardware."""
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
        if missing := _missing_source(dataset):
            console.print(f"[yellow]warning[/] {escape(dataset.id)}: {escape(missing)}", soft_wrap=True)
        for note in local_notes(dataset):
            console.print(f"[yellow]warning[/] {escape(dataset.id)}: {escape(note)}", soft_wrap=True)
    console.print(_datasets_table(project))
    console.print(_settings_table(settings, sources, hardware, set_only))
    return True


def _missing_source(dataset: ImageDataset) -> str:
    """Return what the source of a dataset lacks on this machine; an empty string if nothing."""
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
            table.add_row(key, escape(_format(getattr(settings, key))), source, style=style)
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


def _format(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_format(item)}" for key, item in value.items()) or "none"
    return str(value) if value != "" else '""'
