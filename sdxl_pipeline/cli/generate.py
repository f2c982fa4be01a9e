"""`sdxl-pipeline generate`: images of any prompt with the trained weights of a project or of a released file."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from sdxl_pipeline.config.hardware_profiles import Hardware, HardwareError, hardware_from_name
from sdxl_pipeline.config.loader import (
    CONFIG_FILE,
    DATASETS_FILE,
    InvalidProject,
    Project,
    discover_projects,
    load_project,
)
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_hardware
from sdxl_pipeline.config.schema.training import PROFILE_KEYS, TrainingSettings

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from sdxl_pipeline.models.base_model import ResolvedModel
    from sdxl_pipeline.runtime.specs import CheckpointWeights, TrainedLora

Number = TypeVar("Number", int, float)

USER_MISTAKE = 2
"""Exit status for a mistake in the command or a project, like argparse's own."""

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
"""What `torch.Generator.manual_seed` accepts."""

SELECTED, LAST = "selected", "last"


class Source(NamedTuple):
    """What generates the images."""

    title: str
    weights: Path | None
    """An adapter file or a UNet's folder; None if the base model's file has the trained UNet."""
    base_model: "ResolvedModel"
    hardware: Hardware
    settings: TrainingSettings
    windows: int
    folder: Path
    """Where the images are written without --out."""


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="generate images with trained weights",
        description="Generate images with the trained weights of a project or of a file, and a sheet of all of them.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--project", metavar="NAME", help="name or folder of a project with a finished run")
    source.add_argument(
        "--file",
        type=Path,
        metavar="PATH",
        help="adapter in diffusers' or kohya's format, a UNet's folder, or a complete model as a file or folder",
    )
    parser.add_argument("--prompt", action="append", required=True, help="a prompt; repeat it for several")
    parser.add_argument(
        "--negative", metavar="PROMPT", help="negative prompt (default: validation_negative_prompt)"
    )
    parser.add_argument(
        "--scale",
        type=_numbers(float),
        default=[1.0],
        metavar="LIST",
        help="strengths of the adapter, such as 0.4,0.7,1; 0 is the base model (default: 1)",
    )
    parser.add_argument(
        "--seed", type=_numbers(_seed), metavar="LIST", help="seeds, such as 1,2 (default: validation_seed)"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="STEP",
        help="of a project: step-500, last, or selected by the evaluation (default: selected, else last)",
    )
    parser.add_argument(
        "--run", dest="run_identity", metavar="IDENTITY", help="of a project: another finished run"
    )
    parser.add_argument(
        "--model", metavar="NAME", help="of an adapter or UNet: its base model, a Hub id, folder or file"
    )
    parser.add_argument("--size", metavar="WxH", help="size in pixels (default: validation_resolution)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: validation_num_inference_steps)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for the images")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Generate the images; return 2 for a mistake of the user, whose message is printed."""
    from sdxl_pipeline.models.model_files import BaseModelError
    from sdxl_pipeline.runtime.stage_runner import UserError

    try:
        return _generate(options, console)
    except (UserError, BaseModelError, ProjectError, HardwareError) as error:
        console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
        return USER_MISTAKE


def _generate(options: argparse.Namespace, console: Console) -> int:
    from sdxl_pipeline.runtime.stage_runner import UserError

    if options.out is not None and options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; give a folder, in which the images are written")
    source = _project_source(options) if options.project else _file_source(options, console)
    settings = _with_options(source.settings, options)
    from sdxl_pipeline.evaluation.generation import ImageGenerator, generate_images, require_scales

    require_scales(options.scale, source.weights is not None and source.weights.is_file())
    console.print(f"Generating with {escape(source.title)}.", soft_wrap=True)
    generator = ImageGenerator(source.base_model, source.hardware, settings, source.weights, source.windows)
    negative = settings.validation_negative_prompt if options.negative is None else options.negative
    seeds = options.seed or [settings.effective_validation_seed]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("images")
        images, sheet = generate_images(
            generator,
            list(dict.fromkeys(options.prompt)),
            negative,
            settings.validation_sizes[0],
            seeds,
            options.scale,
            options.out or source.folder,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    for image in images:
        console.print(escape(str(image.path)), soft_wrap=True)
        if image.defect is not None:
            console.print(f"[yellow]    the image is broken: {escape(image.defect)}[/]", soft_wrap=True)
    console.print(f"Sheet: {escape(str(sheet))}", soft_wrap=True)
    return 0


def _numbers(kind: Callable[[str], Number]) -> Callable[[str], list[Number]]:
    def read(text: str) -> list[Number]:
        try:
            return list(dict.fromkeys(kind(part) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a list of numbers; write for example 1,2"
            ) from error

    return read


def _seed(text: str) -> int:
    """Return a seed that torch's generators accept. Raises ValueError for any other text."""
    if not MIN_SEED <= (seed := int(text)) <= MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"{text} is not a seed; write a whole number between {MIN_SEED} and {MAX_SEED}"
        )
    return seed


def _with_options(settings: TrainingSettings, options: argparse.Namespace) -> TrainingSettings:
    from sdxl_pipeline.runtime.stage_runner import UserError

    changes: dict[str, Any] = {}
    if options.size is not None:
        changes["validation_resolution"] = options.size
    if options.steps is not None:
        changes["validation_num_inference_steps"] = options.steps
    try:
        return TrainingSettings.model_validate(settings.model_dump() | changes)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        option = "--size" if detail["loc"] == ("validation_resolution",) else "--steps"
        raise UserError(
            f"{option} {detail['input']}: {detail['msg'].removeprefix('Value error, ')}"
        ) from error


def _hardware() -> Hardware:
    return hardware_from_name(os.environ.get("SDXL_HARDWARE") or "auto")


def _project_source(options: argparse.Namespace) -> Source:
    """Return the weights of a project's run, with the run's own settings. Raises UserError if there is none."""
    from sdxl_pipeline.models.base_model import resolve_base_model
    from sdxl_pipeline.runtime.stage_runner import UserError
    from sdxl_pipeline.training.checkpoint.finished_runs import find_run, list_runs
    from sdxl_pipeline.training.checkpoint.run_identity import read_spec

    if options.model is not None:
        raise UserError("--model applies to --file only: a project has its own base model; remove --model")
    project = _find_project(options.project)
    output_dir = Path(project.training.output_dir)
    runs = list_runs(output_dir)
    if not runs:
        raise UserError(f"the project {project.name} has no finished run; materialize its lora")
    lora = find_run(output_dir, options.run_identity or runs[-1].identity)
    spec = read_spec(Path(lora.run_dir))
    if spec is None:
        raise UserError(f"{lora.run_dir}/spec.json is missing or of another version; materialize lora again")
    base_model = resolve_base_model(spec.settings, project.folder)
    if base_model.digest != spec.base_model.digest:
        raise UserError(
            f"the base model {base_model.source} has changed since the run {lora.identity[:16]}; restore its files, or materialize lora again"
        )
    weights = _choose_weights(lora, output_dir, options.checkpoint)
    return Source(
        title=f"step {weights.step} of the run {lora.identity[:16]} ({weights.weights} weights)",
        weights=Path(weights.path),
        base_model=base_model,
        hardware=resolve_hardware(spec.settings, _hardware()),
        settings=spec.settings,
        windows=max(dataset.text_embeds.windows for dataset in spec.datasets),
        folder=output_dir / "generated",
    )


def _find_project(name: str) -> Project:
    from sdxl_pipeline.runtime.stage_runner import UserError

    if any((Path(name) / file).exists() for file in (CONFIG_FILE, DATASETS_FILE)):
        return load_project(Path(name))
    projects = discover_projects()
    for project in projects:
        if name in (project.name, project.folder.name):
            if isinstance(project, InvalidProject):
                raise project.error
            return project
    known = ", ".join(project.name for project in projects) or "none"
    raise UserError(
        f"--project {name} is neither a project folder nor the name of a project; there are: {known}"
    )


def _choose_weights(lora: "TrainedLora", output_dir: Path, checkpoint: str | None) -> "CheckpointWeights":
    """Return the weights that --checkpoint names. Raises UserError if there are none, or if they have changed."""
    from sdxl_pipeline.files.atomic_files import sha256_path
    from sdxl_pipeline.runtime.stage_runner import UserError
    from sdxl_pipeline.training.checkpoint.checkpoint_files import run_checkpoints

    final = run_checkpoints(lora)[-1]
    # of the kind that the run releases; the final weights are the last
    available = {each.step: each for each in run_checkpoints(lora) if each.weights == final.weights}
    if checkpoint in (None, SELECTED):
        selected = _selected_weights(lora, output_dir)
        if selected is None and checkpoint == SELECTED:
            raise UserError(
                f"no evaluation has selected a checkpoint of the run {lora.identity[:16]}; materialize evaluation, or write --checkpoint last"
            )
        chosen = selected or final
    elif checkpoint == LAST:
        chosen = final
    else:
        by_name = {each.name: each for each in available.values()}
        if checkpoint not in by_name:
            raise UserError(
                f"--checkpoint {checkpoint} does not exist in the run {lora.identity[:16]}; write {SELECTED}, {LAST} or one of: {', '.join(by_name)}"
            )
        chosen = by_name[checkpoint]
    path = Path(chosen.path)
    if not path.exists() or sha256_path(path) != chosen.sha256:
        raise UserError(
            f"{path} is missing, or not what the training wrote; choose another --checkpoint, or materialize lora again"
        )
    return chosen


def _selected_weights(lora: "TrainedLora", output_dir: Path) -> "CheckpointWeights | None":
    """Return the weights that the newest evaluation of a run selected; None without one."""
    from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
    from sdxl_pipeline.training.checkpoint.checkpoint_files import run_checkpoints

    reports = (output_dir / "evaluation").rglob("report.finished.json")
    for path in sorted(reports, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            report = EvaluationReport.model_validate_json(path.read_bytes())
        except ValidationError:  # of an earlier version
            continue
        if report.run_identity != lora.identity or report.selected is None:
            continue
        kept = [each for each in run_checkpoints(lora) if each.sha256 == report.lora_sha256]
        return kept[-1] if kept else report.selected_weights
    return None


def _file_source(options: argparse.Namespace, console: Console) -> Source:
    """Return the weights of a file, with the settings beside it if it is part of a run or of a release."""
    from sdxl_pipeline.evaluation.generation import require_adapter
    from sdxl_pipeline.models.adapters.adapter_files import AdapterError, read_header
    from sdxl_pipeline.models.base_model import resolve_base_model
    from sdxl_pipeline.models.model_files import MODEL_INDEX, BaseModelError
    from sdxl_pipeline.runtime.stage_runner import UserError

    path: Path = options.file
    for name in ("checkpoint", "run_identity"):
        if getattr(options, name) is not None:
            option = "--checkpoint" if name == "checkpoint" else "--run"
            raise UserError(f"{option} applies to --project only: a file has one state; remove {option}")
    if not path.exists():
        raise UserError(f"--file {path} does not exist")
    settings, windows = _settings_beside(path)
    metadata: dict[str, str] = {}
    weights: Path | None = path
    if path.is_file():
        try:
            header = read_header(path)
        except AdapterError as error:
            raise UserError(str(error)) from error
        metadata = dict(header.metadata)
        if any(name.startswith("model.diffusion_model.") for name in header.names):
            weights = None  # a complete checkpoint
        else:
            require_adapter(header)
    elif (path / MODEL_INDEX).is_file():
        weights = None  # a complete model, such as that of `merge --into`
    elif not any(path.glob("diffusion_pytorch_model*")):
        raise UserError(
            f"--file {path} is the folder of neither a UNet nor a complete model; give an adapter file, or --project"
        )
    if weights is None and options.model is not None:
        raise UserError(
            f"--model applies to an adapter or a UNet, but {path} is a complete model; remove --model"
        )
    model = options.model or (str(path.resolve()) if weights is None else None)
    if model is None and settings is None:
        written = metadata.get("ss_sd_model_name", "")
        model = written if written.startswith("bundled:") or written.count("/") == 1 else None
    settings = settings or TrainingSettings()
    if model is not None:
        settings = settings.model_copy(update={"pretrained_model_name_or_path": model, "revision": None})
    settings = settings.model_copy(update=dict.fromkeys(PROFILE_KEYS))
    try:
        base_model = resolve_base_model(settings, Path.cwd())
    except BaseModelError as error:
        raise UserError(
            f"the base model of {path} is not available: {error} Or give it with --model."
        ) from error
    trained_on = metadata.get("base_model_sha256")
    if trained_on is not None and trained_on != base_model.digest:
        console.print(
            f"[yellow]{escape(str(path))} was trained on other files than {escape(base_model.source)}; give its base model with --model.[/]",
            soft_wrap=True,
        )
    return Source(
        title=f"{path.name} on {base_model.source}",
        weights=weights,
        base_model=base_model,
        hardware=_hardware(),
        settings=settings,
        windows=windows,
        folder=Path("generated"),
    )


def _settings_beside(path: Path) -> tuple[TrainingSettings | None, int]:
    """Return the settings of the run or release that contains the file, and its number of windows; None and 1 without."""
    from sdxl_pipeline.release.export import SETTINGS_FILE
    from sdxl_pipeline.training.checkpoint.run_identity import read_spec

    for folder in list(path.resolve().parents)[:4]:  # <run>/checkpoints/step-00000500/ema/<file>
        if (spec := read_spec(folder)) is not None:
            return spec.settings, max(dataset.text_embeds.windows for dataset in spec.datasets)
        try:
            return TrainingSettings.model_validate_json((folder / SETTINGS_FILE).read_bytes()), 1
        except (OSError, ValidationError):
            continue
    return None, 1
