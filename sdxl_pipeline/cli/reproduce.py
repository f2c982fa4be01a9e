"""`sdxl-pipeline reproduce`: train a release again and compare the bytes of the weights."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from sdxl_pipeline.cli.dagster_command import materialize, select
from sdxl_pipeline.config.loader import Project, load_project, projects_folder
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.files.storage_layout import StorageLayout, storage_root

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from sdxl_pipeline.release.reproduce import PublishedRun


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "reproduce",
        help="train a release again and compare the weights",
        description="Make a project from a release, compare its data and base model with the release's digests, train, and compare the weights. "
        "Exit status: 0 for the same bytes, 1 if something differs, 2 if the release cannot be reproduced.",
    )
    parser.add_argument("release", metavar="RELEASE", help="folder of a release, or Hub id owner/name")
    parser.add_argument(
        "--project",
        metavar="NAME",
        help="name of the new project folder (default: the released project's, with _reproduced)",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="ID=LOCATION",
        help="folder, URL or CSV file of a dataset of the release; repeat it for each",
    )
    parser.add_argument(
        "--path",
        action="append",
        default=[],
        metavar="KEY=PATH",
        help="path of a setting that was a local file or folder, such as pretrained_model_name_or_path",
    )
    parser.add_argument(
        "--train-anyway",
        action="store_true",
        help="train although data or base model differ from the release",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Reproduce the release; return 0 for the same bytes, 1 for a difference, 2 for an error."""
    from sdxl_pipeline.release.reproduce import ReproduceError, compare_inputs, read_release, write_project

    try:
        published = read_release(options.release)
        folder = _project_folder(
            f"{published.project}_reproduced" if options.project is None else options.project
        )
        notes = write_project(
            folder, published, _pairs(options.data, "--data"), _pairs(options.path, "--path")
        )
        project = load_project(folder)
    except (ReproduceError, ProjectError) as error:
        console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
        return 2
    _print(console, f"Project {project.name} is in {folder}.")
    for note in (*notes, *_environment_notes(published)):
        _print(console, note, "[yellow]note[/] ")
    if materialize(select(_input_keys(project)), **_process(published)) != 0:
        _print(console, "Not trained: the datasets or the base model failed, see the log above.")
        return 2
    values = StorageLayout(storage_root()).values
    differences = compare_inputs(published, project, values)
    for difference in differences:
        _print(console, difference, "[yellow]differs[/] ")
    if differences and not options.train_anyway:
        _print(
            console,
            "Not trained: the weights would not be the released ones. Add --train-anyway to train nevertheless.",
        )
        return 1
    return _train(project, published, values, console)


def _train(project: Project, published: "PublishedRun", values: Path, console: Console) -> int:
    from sdxl_pipeline.release.reproduce import compare_weights
    from sdxl_pipeline.runtime.specs import TrainedLora

    if materialize(select([f"{project.name}/lora"]), **_process(published)) != 0:
        _print(console, "Not reproduced: the training failed, see the log above.")
        return 2
    lora = TrainedLora.model_validate_json((values / project.name / "lora.json").read_bytes())
    same, sentence = compare_weights(published, lora)
    _print(console, f"{'Reproduced' if same else 'Not reproduced'}: {sentence}.")
    return 0 if same else 1


def _print(console: Console, text: str, prefix: str = "") -> None:
    console.print(prefix + escape(text), soft_wrap=True)


def _project_folder(name: str) -> Path:
    from sdxl_pipeline.release.reproduce import ReproduceError

    if not name or name != Path(name).name or name.startswith("."):
        raise ReproduceError(f"--project {name} is not the name of a folder; write letters, digits, - and _")
    return projects_folder() / name


def _pairs(arguments: Sequence[str], option: str) -> dict[str, str]:
    from sdxl_pipeline.release.reproduce import ReproduceError

    for argument in arguments:
        name, separator, value = argument.partition("=")
        if not (name and separator and value):
            raise ReproduceError(f"{option} {argument} has no name and value; write {option} NAME=VALUE")
    return dict(argument.split("=", 1) for argument in arguments)


def _input_keys(project: Project) -> list[str]:
    """Return the assets that decide whether data and base model are those of the release."""
    keys = [f"{project.name}/base_model"]
    for dataset in project.datasets:
        keys.append(f"{project.name}/{dataset.stage_name('aspect_buckets')}")
        if project.masks_of(dataset):
            keys.append(f"{project.name}/{dataset.stage_name('masks')}")
    return keys


def _process(published: "PublishedRun") -> dict[str, Any]:
    """Return the run config and the environment that give a run the release's device, processes and threads."""
    recorded = published.lineage.get("hardware", {})
    hardware = {key: recorded[key] for key in ("num_processes", "cpu_threads") if recorded.get(key)}
    if recorded.get("device") == "cpu":  # other devices are detected: the release's may not exist here
        hardware |= {"profile": "cpu", "device": "cpu"}
    threads = {"OMP_NUM_THREADS": str(recorded["cpu_threads"])} if recorded.get("cpu_threads") else {}
    return {
        "run_config": {"resources": {"hardware": {"config": hardware}}} if hardware else {},
        "environment": threads,
    }


def _environment_notes(published: "PublishedRun") -> list[str]:
    from sdxl_pipeline.release.reproduce import compare_environment

    differences = compare_environment(published)
    if not differences:
        return []
    return [f"{'; '.join(differences)}: the last bits of the weights may differ"]
