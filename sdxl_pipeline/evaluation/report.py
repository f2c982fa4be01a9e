"""The evaluation report: report.md and the loss plot for people, report.json for the next evaluation, and the comparison of two models."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sdxl_pipeline.files.atomic_files import atomic_path, write_text_atomic
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    ClipSummary,
    EvaluationReport,
    LossSummary,
    Memorisation,
    PairedDifference,
    Scores,
)
from sdxl_pipeline.runtime.specs import KIND_LABELS, CheckpointWeights
from sdxl_pipeline.training.logging.run_logs import EvalRow

BASE_COLOUR, LORA_COLOUR, PROBE_COLOUR = "#8a8a8a", "#1f5fa8", "#c46a16"
WIDE_RANGE = 5
"""Losses that differ by more than this factor are plotted on a logarithmic axis."""

METRIC_LABELS = {
    "base_loss": "Eval loss, base model",
    "lora_loss": "Eval loss, {trained}",
    "loss_ratio": "Eval loss, {trained} / base model",
    "base_clip_mean": "CLIP score, base model, mean",
    "lora_clip_mean": "CLIP score, {trained}, mean",
    "lora_clip_min": "CLIP score, {trained}, lowest",
}
"""Label of every metric by which two reports can be compared; `trained` is one of KIND_LABELS."""


def metrics(
    base_loss: LossSummary | None,
    lora_loss: LossSummary | None,
    base_clip: ClipSummary | None,
    lora_clip: ClipSummary | None,
) -> dict[str, float]:
    """Return the scalar metrics of an evaluation by the names in METRIC_LABELS, without those that were not measured."""
    values: dict[str, float] = {}
    if base_loss is not None and lora_loss is not None:
        values["base_loss"], values["lora_loss"] = base_loss.mean, lora_loss.mean
        values["loss_ratio"] = lora_loss.mean / base_loss.mean
    if base_clip is not None and lora_clip is not None:
        values["base_clip_mean"], values["lora_clip_mean"] = base_clip.mean, lora_clip.mean
        values["lora_clip_min"] = lora_clip.min
    return values


def metric_label(name: str, report: EvaluationReport) -> str:
    """Return the label of one of a report's metrics."""
    return METRIC_LABELS[name].format(trained=KIND_LABELS[report.weights_kind])


def report_metrics(report: EvaluationReport) -> dict[str, float]:
    """Return the scalar metrics of a finished report."""
    return metrics(report.base_loss, report.lora_loss, report.base_clip, report.lora_clip)


def change_since(previous_report: Path | None, current: Mapping[str, float]) -> dict[str, float]:
    """Return current minus previous value of each metric that both evaluations have; empty without a previous report.

    Raises ValueError when the file is not a report.
    """
    if previous_report is None:
        return {}
    previous = json.loads(previous_report.read_text(encoding="utf-8")).get("figures")
    if not isinstance(previous, dict):
        raise ValueError(f"{previous_report} is not a report.json of an evaluation: it has no `figures`")
    return {name: current[name] - previous[name] for name in current if name in previous}


def paired_difference(after: LossSummary, before: Mapping[str, float]) -> PairedDifference:
    """Return the mean of (after - before) over the images that both have, with its standard error.

    Pairing by image is exact because each image is measured at the same timesteps and noise for every model.
    """
    differences = [loss - before[image] for image, loss in after.by_image if image in before]
    if not differences:
        return PairedDifference(images=0, mean=0.0, standard_error=None)
    count = len(differences)
    mean = sum(differences) / count
    squares = sum((difference - mean) ** 2 for difference in differences)
    error = math.sqrt(squares / (count - 1) / count) if count > 1 else None
    return PairedDifference(images=count, mean=mean, standard_error=error)


def released_losses(report: Path) -> dict[str, float]:
    """Return the trained model's loss by image from a released report.json; empty for a report of an earlier version without them."""
    loss = json.loads(report.read_text(encoding="utf-8")).get("lora_loss") or {}
    return dict(loss.get("by_image", ()))


def portable_report(report: EvaluationReport, scoring_model: str | None) -> dict[str, Any]:
    """Return the report as plain data without local paths, with the labels of its metrics; this is what a release publishes."""
    content = report.model_dump(
        mode="json",
        exclude={
            "gallery_path": True,
            "loss_plot_path": True,
            "report_path": True,
            "html_path": True,
            "blind_ab_path": True,
            "loss_by_step_path": True,
            "images": {"__all__": {"path"}},
            "selected_weights": {"path"},
            "memorisation": {"pairs", "sheet_path"},
        },
    )
    values = report_metrics(report)
    labels = {name: metric_label(name, report) for name in values}
    texts = {"figure_names": labels, "measurement": describe_measurement(report, scoring_model)}
    return {"figures": values, **texts, **content}


def write_report(report: EvaluationReport, project: str, scoring_model: str | None) -> None:
    """Write report.md at `report.report_path` and report.json beside it."""
    path = Path(report.report_path)
    write_text_atomic(path, markdown_report(report, project, scoring_model))
    data = portable_report(report, scoring_model)
    write_text_atomic(path.with_suffix(".json"), json.dumps(data, indent=2) + "\n")


def markdown_report(report: EvaluationReport, project: str, scoring_model: str | None) -> str:
    """Return the report as Markdown, with image links relative to `report.report_path`."""
    folder = Path(report.report_path).parent

    def link(path: str) -> str:
        return Path(os.path.relpath(path, folder)).as_posix()

    label = KIND_LABELS[report.weights_kind]
    parts = [f"# Evaluation of {project}\n", f"![base model beside {label}]({link(report.gallery_path)})\n"]
    if report.broken_images:
        parts.append("**Broken images:**\n")
        parts.append("".join(f"- {item.name}: {item.reason}\n" for item in report.broken_images))
    if report.selected is not None:
        parts.append(f"{report.selected.text}\n")
    parts += ["## Metrics\n", metrics_table(report), ""]
    parts.append(f"{describe_measurement(report, scoring_model)}\n")
    if report.checkpoints:
        parts.append("## Eval loss by step\n")
        if report.loss_by_step_path is not None:
            parts.append(f"![eval loss by step]({link(report.loss_by_step_path)})\n")
        parts.append(checkpoint_table(report.checkpoints))
        if report.overfitting is not None:
            parts.append(f"{report.overfitting.text}\n")
    if report.scores is not None:
        parts += ["## Scores\n", score_table(report.scores)]
    if report.memorisation is not None:
        parts += ["## Memorisation\n", memorisation_section(report.memorisation, link)]
    if report.base_loss is not None and report.lora_loss is not None:
        parts.append("## Eval loss by timestep\n")
        if report.loss_plot_path is not None:
            parts.append(f"![eval loss by timestep]({link(report.loss_plot_path)})\n")
        parts.append(loss_table(report.base_loss, report.lora_loss, label))
    return "\n".join(parts).rstrip() + "\n"


def metrics_table(report: EvaluationReport) -> str:
    """Return all metrics as a Markdown table, with their change since the last release if there was one."""
    values = report_metrics(report)
    if not values:
        return "Neither the eval loss nor the CLIP score is enabled in the settings.\n"
    has_changes = bool(report.change_since_release)
    lines = ["| metric | value |" + (" change since the last release |" if has_changes else "")]
    lines.append("|---|---:|" + ("---:|" if has_changes else ""))
    for name, value in values.items():
        row = f"| {metric_label(name, report)} | {value:.4g} |"
        if has_changes:
            change = report.change_since_release.get(name)
            row += f" {change:+.3g} |" if change is not None else " |"
        lines.append(row)
    return "\n".join(lines) + "\n"


def describe_checkpoint(weights: CheckpointWeights | CheckpointLoss) -> str:
    """Return the name of a checkpoint in texts."""
    return f"step {weights.step}" + (" (EMA)" if weights.weights == "ema" else "")


def checkpoint_table(losses: Iterable[CheckpointLoss]) -> str:
    """Return the losses of all checkpoints as a Markdown table; differences with one standard error."""
    lines = [
        "| checkpoint | eval loss | to the base model | to the lowest | train probe | gap |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for loss in losses:
        cells = [
            describe_checkpoint(loss),
            f"{loss.held_out.mean:.5f}",
            with_error(loss.to_base.mean, loss.to_base.standard_error),
            "" if loss.to_best is None else with_error(loss.to_best.mean, loss.to_best.standard_error),
            "" if loss.probe is None else f"{loss.probe.mean:.5f}",
            "" if loss.gap is None else with_error(loss.gap.mean, loss.gap.standard_error),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def score_table(scores: Scores) -> str:
    """Return the scores as a Markdown table, with what limits them and which are omitted as sentences."""
    lines = [
        "| score | base model | selected checkpoint | difference | training images |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, pair in (
        ("CLIP score", scores.clip),
        ("subject fidelity", scores.fidelity),
        ("diversity", scores.diversity),
    ):
        if pair is not None:
            difference = with_error(pair.difference.mean, pair.difference.standard_error)
            ceiling = "" if pair.ceiling is None else f"{pair.ceiling:.4g}"
            lines.append(f"| {name} | {pair.base:.4g} | {pair.lora:.4g} | {difference} | {ceiling} |")
    base, lora = scores.cmmd_base, scores.cmmd_lora
    if base is not None and lora is not None and base.value is not None and lora.value is not None:
        lines.append(f"| CMMD | {base.value:.3f} | {lora.value:.3f} | | |")
    sentences = [*scores.notes.values(), *scores.omitted.values()]
    if lora is not None:
        sentences.append(lora.text)
    return "\n".join(lines) + "\n\n" + "\n".join(f"- {text.removesuffix('.')}." for text in sentences) + "\n"


def memorisation_section(memorisation: Memorisation, link: Callable[[str], str]) -> str:
    """Return the result of the check for copies as Markdown, with its image."""
    image = (
        ""
        if memorisation.sheet_path is None
        else f"![generated images beside training images]({link(memorisation.sheet_path)})\n\n"
    )
    return f"{image}{memorisation.text}\n"


def with_error(mean: float, error: float | None) -> str:
    """Return a signed number with its standard error."""
    return f"{mean:+.2g}" + ("" if error is None else f" ± {error:.1g}")


def describe_measurement(report: EvaluationReport, scoring_model: str | None) -> str:
    """Return a few sentences on how the metrics were measured."""
    sentences = []
    if report.lora_loss is not None:
        source = {
            "eval dataset": "of the eval datasets",
            "held-out share": "held out from the training",
            "training images": f"**the {KIND_LABELS[report.weights_kind]} was trained on** (there is neither an eval dataset nor a held-out share)",
        }[report.eval_source]
        sentences.append(
            f"The eval loss is the mean squared error of the denoising prediction over {report.eval_images} images {source} and "
            f"{len(report.lora_loss.by_timestep)} fixed timesteps, with noise that depends only on the image and the timestep. Lower is better."
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
            f"The CLIP score is 100 times the cosine similarity of image and prompt (at least 0), measured by {scoring_model} over the "
            "gallery. Higher is better."
        )
    return " ".join(sentences)


def describe_difference(difference: PairedDifference) -> str:
    """Return a paired difference as text."""
    if not difference.images:
        return "unknown, since the two measurements have no image in common"
    error = difference.standard_error
    spread = "without a standard error" if error is None else f"± {error:.2g} (standard error)"
    return f"{difference.mean:+.3g} {spread}, paired over {difference.images} image{'s' if difference.images > 1 else ''}"


def loss_table(base: LossSummary, lora: LossSummary, label: str) -> str:
    """Return the eval loss by timestep as a Markdown table."""
    lines = [f"| timestep | base model | {label} | change |", "|---:|---:|---:|---:|"]
    for (timestep, before), (_, after) in zip(base.by_timestep, lora.by_timestep, strict=True):
        lines.append(f"| {timestep} | {before:.5f} | {after:.5f} | {after / before - 1:+.1%} |")
    return "\n".join(lines) + "\n"


def plot_losses(base: LossSummary, lora: LossSummary, label: str, path: Path) -> None:
    """Write a PNG of both losses over the timesteps; the area between the curves is the effect of the training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    timesteps = [timestep for timestep, _ in base.by_timestep]
    before = [loss for _, loss in base.by_timestep]
    after = [loss for _, loss in lora.by_timestep]
    for losses, colour, name, mean in (
        (before, BASE_COLOUR, "base model", base.mean),
        (after, LORA_COLOUR, label, lora.mean),
    ):
        axes.plot(
            timesteps, losses, color=colour, marker="o", markersize=3.5, label=f"{name}, mean {mean:.4g}"
        )
    axes.fill_between(timesteps, before, after, color=LORA_COLOUR, alpha=0.12, linewidth=0)
    if max(before + after) > WIDE_RANGE * min(before + after):
        axes.set_yscale("log")  # on a linear axis only the largest losses would be distinguishable
    axes.set(xlabel="timestep (0 is a clean image)", ylabel="eval loss", title="Eval loss by timestep")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def rows_of_images(
    rows: Iterable[EvalRow], base: LossSummary, base_probe: LossSummary | None
) -> list[EvalRow]:
    """Return the finite eval losses measured during the training, after step 0, on the same images as `base`.

    A train probe that is not finite, or of other images than `base_probe`, is left out of its row.
    """
    images, probed = _images(base), base_probe and _images(base_probe)
    return [
        row
        if row.probe is None or (math.isfinite(row.probe.mean) and _images(row.probe) == probed)
        else row.model_copy(update={"probe": None})
        for row in rows
        if row.step and math.isfinite(row.loss.mean) and _images(row.loss) == images
    ]


def _images(loss: LossSummary) -> set[str]:
    return {name for name, _ in loss.by_image}


def plot_losses_by_step(report: EvaluationReport, rows: Iterable[EvalRow], path: Path) -> None:
    """Write a PNG of the eval loss and the train probe by step, with the selected step and the range of over-fitting.

    Checkpoints of the selected kind of weights, and losses that were measured during the training on the same images (`rows`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert report.base_loss is not None
    base, base_probe = report.base_loss, report.base_probe
    held_out, probe = {0: base.mean}, {0: base_probe.mean} if base_probe is not None else {}
    for step, loss, of_probe in [
        *((row.step, row.loss, row.probe) for row in rows_of_images(rows, base, base_probe)),
        *(
            (each.step, each.held_out, each.probe)
            for each in report.checkpoints
            if each.weights == report.weights
        ),
    ]:
        held_out[step] = loss.mean
        if of_probe is not None:
            probe[step] = of_probe.mean
    figure = Figure(figsize=(7.2, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured_on = "training images" if report.eval_source == "training images" else "held-out images"
    for losses, colour, name in ((held_out, LORA_COLOUR, measured_on), (probe, PROBE_COLOUR, "train probe")):
        if losses:
            steps = sorted(losses)
            axes.plot(
                steps, [losses[step] for step in steps], color=colour, marker="o", markersize=3.5, label=name
            )
    axes.axvline(
        report.step, color=BASE_COLOUR, linestyle="--", linewidth=1, label=f"selected: step {report.step}"
    )
    if report.overfitting is not None and report.overfitting.from_step is not None:
        start = report.overfitting.from_step
        axes.axvspan(
            start, max(held_out), color="#b3261e", alpha=0.12, label=f"over-fitting from step {start}"
        )
    values = [*held_out.values(), *probe.values()]
    if max(values) > WIDE_RANGE * min(values):
        axes.set_yscale("log")
    axes.set(xlabel="step (0 is the base model)", ylabel="eval loss", title="Eval loss by step")
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
