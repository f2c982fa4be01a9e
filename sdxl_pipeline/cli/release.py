"""`sdxl-pipeline release`: evaluate and release a finished run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sdxl_pipeline.cli.dagster_command import materialize
from sdxl_pipeline.cli.select_project import select_project

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "release",
        help="evaluate and release a finished run",
        description="Evaluate a finished run of a project and release its selected checkpoint: materialize evaluation and hub_release.",
    )
    parser.add_argument("project", help="name or folder of the project")
    parser.add_argument(
        "--run",
        dest="identity",
        metavar="IDENTITY",
        help="the run to release, at least 8 characters of its identity as `sdxl-pipeline runs` shows it (default: the current LoRA)",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="best, last, or a step such as step-500 (default: released_checkpoint in config.json)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Materialize both assets; return 1 if the project or run does not exist, or if it is not released."""
    from sdxl_pipeline.runtime.stage_runner import UserError
    from sdxl_pipeline.training.checkpoint.finished_runs import find_run

    project = select_project(options.project, console)
    if project is None:
        return 1
    identity = ""
    if options.identity:
        try:
            identity = find_run(Path(project.training.output_dir), options.identity).identity
        except UserError as error:
            console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
            return 1
    keys = [f"{project.name}/evaluation", f"{project.name}/hub_release"]
    selection = " or ".join(f'key:"{key}"' for key in keys)
    return 1 if materialize(selection, run_config(project.name, identity, options.checkpoint or "")) else 0


def run_config(project: str, identity: str, checkpoint: str) -> dict[str, Any]:
    """Return the run config that evaluates and releases a run; empty strings select the current LoRA and the configured checkpoint."""
    configs = {
        "evaluation": {"run": identity, "checkpoint": checkpoint},
        "hub_release": {"promote": identity},
    }
    given = {
        f"{project}__{stage}": {"config": {name: value for name, value in config.items() if value}}
        for stage, config in configs.items()
        if any(config.values())
    }
    return {"ops": given} if given else {}
