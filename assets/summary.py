"""`python -m assets.summary <project>`: what the last materialization made, where it lies, and what it did not have to do again."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console

from assets.asset_keys import dataset_key, project_key
from sdxl_pipeline.config.loader import Project, discover_projects
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    EvaluationReport,
    HubRelease,
    LatentCache,
    TextEmbedCache,
    TrainedLora,
)


@dataclass(frozen=True)
class Results:
    """What the stages of a project handed on when they last ran."""

    latents: list[LatentCache]
    texts: list[TextEmbedCache]
    lora: TrainedLora
    report: EvaluationReport
    release: HubRelease


def main(name: str) -> None:
    """Print the summary of one project to the terminal. Raises SystemExit when there is no such project."""
    projects = {project.name: project for project in discover_projects() if isinstance(project, Project)}
    if name not in projects:
        raise SystemExit(f"There is no project {name!r}; there are: {', '.join(projects) or 'none'}.")
    results = load_results(projects[name])
    console = Console(highlight=False, soft_wrap=True)
    for line in work_done(results):
        console.print(line)
    for what, where in [*places(results), ("UI", "make ui, then http://127.0.0.1:3000")]:
        console.print(f"{what:<20}{where}")


def load_results(project: Project) -> Results:
    """The values of a project's assets. Raises `dagster.Failure` naming the one that was never materialized."""
    definitions = build_definitions()

    def load(key: dg.AssetKey, value_type: type) -> Any:
        return definitions.load_asset_value(key, python_type=value_type)

    def of_datasets(stage: str, value_type: type) -> list[Any]:
        return [load(dataset_key(project, dataset, stage), value_type) for dataset in project.datasets]

    return Results(
        latents=of_datasets("vae_latents", LatentCache),
        texts=of_datasets("text_embeds", TextEmbedCache),
        lora=load(project_key(project, "lora"), TrainedLora),
        report=load(project_key(project, "evaluation"), EvaluationReport),
        release=load(project_key(project, "hub_release"), HubRelease),
    )


def work_done(results: Results) -> list[str]:
    """Sentences on what was encoded, trained and measured, and what was reused."""
    lora, report = results.lora, results.report
    called = KIND_LABELS[lora.weights_kind]
    lines = [
        f"latents: {sum(c.encoded for c in results.latents)} encoded, {sum(c.reused for c in results.latents)} reused",
        f"captions: {sum(c.encoded for c in results.texts)} encoded, {sum(c.reused for c in results.texts)} reused",
        f"training: nothing to do, this {called} was finished before"
        if lora.reused
        else f"training: {lora.steps} steps in {lora.seconds:.0f} s",
    ]
    if report.base_loss and report.lora_loss:
        again = ", measured before" if report.reused else ""
        lines.append(
            f"eval loss on {report.eval_images} images ({report.eval_source}{again}): "
            f"base {report.base_loss.mean:.4f}, {called} {report.lora_loss.mean:.4f}"
        )
    return lines


def places(results: Results) -> list[tuple[str, str]]:
    """(what, path) of what a person wants to open, relative to the working directory where the files lie below it."""
    lora = results.lora
    return [
        ("before and after", _short(results.report.gallery_path)),
        (KIND_LABELS[lora.weights_kind], _short(lora.weights_path)),
        *([("for ComfyUI, A1111", _short(lora.kohya_path))] if lora.kohya_path else []),
        ("report", _short(results.report.report_path)),
        ("release", results.release.url or _short(results.release.folder)),
    ]


def _short(path: str) -> str:
    absolute = Path(path)
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
