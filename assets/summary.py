"""`python -m assets.summary <project>`: print the results of the last materialization, their paths, and what was reused."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console

from assets.asset_keys import dataset_key, project_key
from sdxl_pipeline.config.loader import Project, discover_projects
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport, HubRelease
from sdxl_pipeline.runtime.specs import KIND_LABELS, LatentCache, TextEmbedCache, TrainedLora


@dataclass(frozen=True)
class Results:
    """Values of a project's assets at their last materialization."""

    latents: list[LatentCache]
    texts: list[TextEmbedCache]
    lora: TrainedLora
    report: EvaluationReport
    release: HubRelease


def main(name: str) -> None:
    """Print the summary of one project to the terminal. Raise SystemExit when there is no such project."""
    projects = {project.name: project for project in discover_projects() if isinstance(project, Project)}
    if name not in projects:
        raise SystemExit(f"There is no project {name!r}; there are: {', '.join(projects) or 'none'}.")
    results = load_results(projects[name])
    console = Console(highlight=False, soft_wrap=True)
    for line in work_summary(results):
        console.print(line)
    for label, path in [*output_paths(results), ("UI", "make ui, then http://127.0.0.1:3000")]:
        console.print(f"{label:<20}{path}")


def load_results(project: Project) -> Results:
    """Return the values of a project's assets. Raise `dagster.Failure` with the key of the first that was never materialized."""
    definitions = build_definitions()

    def load(key: dg.AssetKey, value_type: type) -> Any:
        return definitions.load_asset_value(key, python_type=value_type)

    def load_per_dataset(stage: str, value_type: type) -> list[Any]:
        return [load(dataset_key(project, dataset, stage), value_type) for dataset in project.datasets]

    return Results(
        latents=load_per_dataset("vae_latents", LatentCache),
        texts=load_per_dataset("text_embeds", TextEmbedCache),
        lora=load(project_key(project, "lora"), TrainedLora),
        report=load(project_key(project, "evaluation"), EvaluationReport),
        release=load(project_key(project, "hub_release"), HubRelease),
    )


def work_summary(results: Results) -> list[str]:
    """Return one line each on encoding, training and evaluation, work done and work reused, and on what the evaluation concludes."""
    lora, report = results.lora, results.report
    label = KIND_LABELS[lora.weights_kind]
    lines = [
        f"latents: {sum(c.encoded for c in results.latents)} encoded, {sum(c.reused for c in results.latents)} reused",
        f"captions: {sum(c.encoded for c in results.texts)} encoded, {sum(c.reused for c in results.texts)} reused",
        f"training: nothing to do, this {label} was finished before"
        if lora.reused
        else f"training: {lora.steps} steps in {lora.seconds:.0f} s",
    ]
    if report.base_loss and report.lora_loss:
        reused = ", measured before" if report.reused else ""
        lines.append(
            f"eval loss on {report.eval_images} images ({report.eval_source}{reused}): "
            f"base {report.base_loss.mean:.4f}, {label} {report.lora_loss.mean:.4f}"
        )
    conclusions = (report.selected, report.overfitting, report.memorisation)
    return [*lines, *(conclusion.text for conclusion in conclusions if conclusion is not None)]


def output_paths(results: Results) -> list[tuple[str, str]]:
    """Return (label, path) of the output files, relative to the working directory where they are below it."""
    lora = results.lora
    return [
        ("before and after", _short(results.report.gallery_path)),
        (KIND_LABELS[lora.weights_kind], _short(lora.weights_path)),
        *([("for ComfyUI, A1111", _short(lora.kohya_path))] if lora.kohya_path else []),
        ("report", _short(results.report.report_path)),
        *([("report page", _short(page))] if (page := results.report.html_path) else []),
        ("release", results.release.url or _short(results.release.folder)),
    ]


def _short(path: str) -> str:
    absolute = Path(path)
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo")
