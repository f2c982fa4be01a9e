"""The project that a command is about, by its name or folder."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sdxl_pipeline.config.loader import (
    CONFIG_FILE,
    InvalidProject,
    Project,
    discover_projects,
    load_project,
    projects_folder,
)
from sdxl_pipeline.config.problems import ProjectError


def select_project(name: str, console: Console) -> Project | None:
    """Return the valid project with this name or in this folder; otherwise print what is wrong and return None."""
    if (Path(name) / CONFIG_FILE).is_file():
        try:
            return load_project(Path(name))
        except ProjectError as error:
            _print_error(console, str(error))
            return None
    discovered = discover_projects()
    for project in discovered:
        if name not in (project.name, project.folder.name):
            continue
        if isinstance(project, InvalidProject):
            _print_error(console, str(project.error))
            return None
        return project
    known = ", ".join(project.name for project in discovered) or f"none in {projects_folder()}"
    _print_error(console, f"{name} is neither a project folder nor the name of a project; there are: {known}")
    return None


def _print_error(console: Console, message: str) -> None:
    console.print(f"[bold red]{escape(message)}[/]", soft_wrap=True)
