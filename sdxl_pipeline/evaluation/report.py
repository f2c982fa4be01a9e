"""The evaluation as people read it (report.md, the loss plot) and as the next one compares itself with it (report.json)."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import atomic_path, write_text_atomic
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    ClipSummary,
    EvaluationReport,
    LossSummary,
    PairedDifference,
)

BASE_COLOUR, LORA_COLOUR = "#8a8a8a", "#1f5fa8"
WIDE_RANGE = 5
"""Losses that differ by more than this factor are plotted on a logarithmic axis."""

FIGURE_NAMES = {
    "base_loss": "Eval loss, base model",
    "lora_loss": "Eval loss, {trained}",
    "loss_ratio": "Eval loss, {trained} / base model",
    "base_clip_mean": "CLIP score, base model, mean",
    "lora_clip_mean": "CLIP score, {trained}, mean",
    "lora_clip_min": "CLIP score, {trained}, lowest",
}
"""Every figure that two reports can be compared by, and what people call it; `trained` is one of KIND_LABELS."""


def figures(
    base_loss: LossSummary | None,
    lora_loss: LossSummary | None,
    base_clip: ClipSummary | None,
    lora_clip: ClipSummary | None,
) -> dict[str, float]:
    """The single numbers of an evaluation, by the names of FIGURE_NAMES; those not measured are absent."""
    found: dict[str, float] = {}
    if base_loss is not None and lora_loss is not None:
        found["base_loss"], found["lora_loss"] = base_loss.mean, lora_loss.mean
        found["loss_ratio"] = lora_loss.mean / base_loss.mean
    if base_clip is not None and lora_clip is not None:
        found["base_clip_mean"], found["lora_clip_mean"] = base_clip.mean, lora_clip.mean
        found["lora_clip_min"] = lora_clip.min
    return found


def figure_name(name: str, report: EvaluationReport) -> str:
    """What people call a figure of a report."""
    return FIGURE_NAMES[name].format(trained=KIND_LABELS[report.weights_kind])


def report_figures(report: EvaluationReport) -> dict[str, float]:
    """The figures of a finished report."""
    return figures(report.base_loss, report.lora_loss, report.base_clip, report.lora_clip)


def change_since(previous_report: Path | None, now: Mapping[str, float]) -> dict[str, float]:
    """The present figures minus those of an earlier evaluation, for each figure both have; empty without an earlier one.

    Raises ValueError when the file is not a report.
    """
    if previous_report is None:
        return {}
    before = json.loads(previous_report.read_text(encoding="utf-8")).get("figures")
    if not isinstance(before, dict):
        raise ValueError(f"{previous_report} is not a report.json of an evaluation: it has no `figures`")
    return {name: now[name] - before[name] for name in now if name in before}


def portable(report: EvaluationReport, scoring_model: str | None) -> dict[str, Any]:
    """The report as plain data without any path of this machine, with the words to show its figures by; a release publishes it."""
    kept = report.model_dump(
        mode="json",
        exclude={
            "gallery_path": True,
            "loss_plot_path": True,
            "report_path": True,
            "images": {"__all__": {"path"}},
        },
    )
    found = report_figures(report)
    names = {name: figure_name(name, report) for name in found}
    words = {"figure_names": names, "measurement": describe_measurement(report, scoring_model)}
    return {"figures": found, **words, **kept}


def write_report(report: EvaluationReport, project: str, scoring_model: str | None) -> None:
    """Write report.md at `report.report_path` and report.json beside it."""
    path = Path(report.report_path)
    write_text_atomic(path, markdown(report, project, scoring_model))
    write_text_atomic(path.with_suffix(".json"), json.dumps(portable(report, scoring_model), indent=2) + "\n")


def markdown(report: EvaluationReport, project: str, scoring_model: str | None) -> str:
    """The report as Markdown, its images linked relative to `report.report_path`."""
    folder = Path(report.report_path).parent

    def link(path: str) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    called = KIND_LABELS[report.weights_kind]
    parts = [f"# Evaluation of {project}\n", f"![base model beside {called}]({link(report.gallery_path)})\n"]
    if report.broken_images:
        parts.append("**Broken images:**\n")
        parts.append("".join(f"- {item.name}: {item.reason}\n" for item in report.broken_images))
    parts += ["## Figures\n", markdown_table(report), ""]
    parts.append(f"{describe_measurement(report, scoring_model)}\n")
    if report.base_loss is not None and report.lora_loss is not None:
        parts.append("## Eval loss by timestep\n")
        if report.loss_plot_path is not None:
            parts.append(f"![eval loss by timestep]({link(report.loss_plot_path)})\n")
        parts.append(loss_table(report.base_loss, report.lora_loss, called))
    return "\n".join(parts).rstrip() + "\n"


def markdown_table(report: EvaluationReport) -> str:
    """All figures as a Markdown table, with their change since the last release where there was one."""
    found = report_figures(report)
    if not found:
        return "Neither the eval loss nor the CLIP score was asked for.\n"
    compared = bool(report.change_since_release)
    lines = ["| figure | value |" + (" change since the last release |" if compared else "")]
    lines.append("|---|---:|" + ("---:|" if compared else ""))
    for name, value in found.items():
        row = f"| {figure_name(name, report)} | {value:.4g} |"
        if compared:
            change = report.change_since_release.get(name)
            row += f" {change:+.3g} |" if change is not None else " |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def describe_measurement(report: EvaluationReport, scoring_model: str | None) -> str:
    """How the figures came about, in a few sentences."""
    sentences = []
    if report.lora_loss is not None:
        source = {
            "eval dataset": "of the eval datasets",
            "held-out share": "held out of the training",
            "training images": f"**the {KIND_LABELS[report.weights_kind]} was trained on** (there is neither an eval dataset nor a held-out share)",
        }[report.eval_source]
        sentences.append(
            f"The eval loss is the mean squared error of the denoising prediction over {report.eval_images} images {source} and "
            f"{len(report.lora_loss.by_timestep)} fixed timesteps, with noise that depends only on image and timestep; lower is better."
        )
        if report.difference_to_base is not None:
            sentences.append(
                f"Difference to the base model: {describe_difference(report.difference_to_base)}."
            )
        if report.difference_to_release is not None:
            sentences.append(
                f"Difference to the last release: {describe_difference(report.difference_to_release)}."
            )
    if report.lora_clip is not None:
        sentences.append(
            f"The CLIP score is 100 times the cosine of image and prompt, at least 0, by {scoring_model}, over the gallery; "
            "higher is better."
        )
    return " ".join(sentences)


def describe_difference(difference: PairedDifference) -> str:
    """Return a paired difference in words."""
    if not difference.images:
        return "unknown, since no image was measured alike"
    error = difference.standard_error
    spread = "without a standard error" if error is None else f"± {error:.2g} (standard error)"
    return f"{difference.mean:+.3g} {spread}, paired over {difference.images} image{'s' if difference.images > 1 else ''}"


def loss_table(base: LossSummary, lora: LossSummary, called: str) -> str:
    """Eval loss by timestep as a Markdown table."""
    lines = [f"| timestep | base model | {called} | change |", "|---:|---:|---:|---:|"]
    for (timestep, before), (_, after) in zip(base.by_timestep, lora.by_timestep, strict=True):
        lines.append(f"| {timestep} | {before:.5f} | {after:.5f} | {after / before - 1:+.1%} |")
    return "\n".join(lines) + "\n"


def plot_losses(base: LossSummary, lora: LossSummary, called: str, path: Path) -> None:
    """Write a PNG of both losses over the timesteps; the area between them is what the training learned, or unlearned."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    timesteps = [timestep for timestep, _ in base.by_timestep]
    before = [loss for _, loss in base.by_timestep]
    after = [loss for _, loss in lora.by_timestep]
    axes.plot(
        timesteps,
        before,
        color=BASE_COLOUR,
        marker="o",
        markersize=3.5,
        label=f"base model, mean {base.mean:.4g}",
    )
    axes.plot(
        timesteps,
        after,
        color=LORA_COLOUR,
        marker="o",
        markersize=3.5,
        label=f"{called}, mean {lora.mean:.4g}",
    )
    axes.fill_between(timesteps, before, after, color=LORA_COLOUR, alpha=0.12, linewidth=0)
    if max(before + after) > WIDE_RANGE * min(before + after):
        axes.set_yscale("log")  # a linear axis would show the largest losses only
    axes.set(xlabel="timestep (0 is a clean image)", ylabel="eval loss", title="Eval loss by timestep")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
