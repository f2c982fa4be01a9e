"""`python -m assets.summary <project>`: what the last materialization made, where it lies, and what it did not have to do again."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import dagster as dg
from rich.console import Console
from rich.table import Table

from assets.keys import lane_key, project_key
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.project.project import Project, discover_projects
from sdxl_pipeline.stages.specs import EvaluationReport, HubRelease, LatentCache, TextEmbedCache, TrainedLora


def main(name: str) -> None:
    """Print the summary of one project to the terminal. Raises SystemExit when there is no such project."""
    projects = {project.name: project for project in discover_projects() if isinstance(project, Project)}
    if name not in projects:
        raise SystemExit(f"There is no project {name!r}; there are: {', '.join(projects) or 'none'}.")
    console = Console(highlight=False, soft_wrap=True)
    for line in work_done(projects[name]):
        console.print(line)
    table = Table.grid(padding=(0, 2))
    for what, where in places(projects[name]):
        table.add_row(what, where)
    console.print(table)


def work_done(project: Project) -> list[str]:
    """Sentences on what was encoded, trained and measured, and what was reused."""
    latents = [_load(lane_key(project, dataset, "vae_latents"), LatentCache) for dataset in project.datasets]
    texts = [_load(lane_key(project, dataset, "text_embeds"), TextEmbedCache) for dataset in project.datasets]
    lora = _load(project_key(project, "lora"), TrainedLora)
    report = _load(project_key(project, "evaluation"), EvaluationReport)
    lines = [
        f"latents: {sum(c.encoded for c in latents)} encoded, {sum(c.reused for c in latents)} reused; "
        f"captions: {sum(c.encoded for c in texts)} encoded, {sum(c.reused for c in texts)} reused",
        "training: nothing to do, this LoRA was finished before"
        if lora.reused
        else f"training: {lora.steps} steps in {lora.seconds:.0f} s",
    ]
    if report.base_loss and report.lora_loss:
        lines.append(
            f"eval loss on {report.eval_images} pictures ({report.eval_source}): "
            f"base {report.base_loss.mean:.4f}, LoRA {report.lora_loss.mean:.4f}"
        )
    return lines


def places(project: Project) -> list[tuple[str, str]]:
    """(what, path) of everything a person wants to open, paths relative to the working directory where that is shorter."""
    lora = _load(project_key(project, "lora"), TrainedLora)
    report = _load(project_key(project, "evaluation"), EvaluationReport)
    release = _load(project_key(project, "hub_release"), HubRelease)
    return [
        ("before and after", _short(report.gallery_path)),
        ("LoRA", _short(lora.weights_path)),
        ("report", _short(report.report_path)),
        ("release", release.url or _short(release.folder)),
        ("UI", f"make ui, then http://127.0.0.1:3000/asset-groups ({project.name})"),
    ]


def _load(key: dg.AssetKey, value_type: type) -> Any:
    return _definitions().load_asset_value(key, python_type=value_type)


@cache
def _definitions() -> dg.Definitions:
    return build_definitions()


def _short(path: str) -> str:
    absolute = Path(path)
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["demo"])
