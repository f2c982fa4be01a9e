"""What the page of `evaluation` shows: the selected checkpoint, losses, scores, and the latest evaluations of the project."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from assets.metadata import drop_none, inline_image, markdown_table
from sdxl_pipeline.evaluation.blind_votes import read_votes
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.runtime.evaluation_report import (
    ClipSummary,
    Cmmd,
    EvaluationReport,
    HistoryRow,
    PairedDifference,
    ProbeGap,
    ScorePair,
)
from sdxl_pipeline.runtime.specs import KIND_LABELS

MAX_HISTORY = 20
"""Rows of the history on the page; `sdxl-pipeline runs` prints all."""


def report_metadata(report: EvaluationReport, is_current: bool) -> dict[str, Any]:
    """Return run and selection, losses, scores, plots and pages of a report; `is_current` is whether its run is the value of `lora`."""
    base, lora, memorisation = report.base_loss, report.lora_loss, report.memorisation
    changes = sorted(report.change_since_release.items())
    return drop_none(
        {
            "run": report.run_identity + ("" if is_current else " (not the current LoRA)"),
            "checkpoint": f"step {report.step}, {report.weights} weights",
            "selection": report.selected.text if report.selected else None,
            "overfitting": report.overfitting.text if report.overfitting else None,
            "memorisation": memorisation.text if memorisation else None,
            "gallery": inline_image(report.gallery_path, f"base beside {KIND_LABELS[report.weights_kind]}"),
            "report_page": _page(report.html_path),
            "report_page_path": _path(report.html_path),
            "blind_comparison": _page(report.blind_ab_path),
            "blind_votes": " ".join(
                votes.describe() for votes in read_votes(Path(report.report_path).parent, report.identity)
            )
            or None,
            "eval_loss_base": base.mean if base else None,
            "eval_loss_lora": lora.mean if lora else None,
            "eval_loss_ratio": lora.mean / base.mean if base and lora else None,
            "difference_to_base": _difference(report.difference_to_base),
            "difference_to_release": _difference(report.difference_to_release),
            "eval_images": f"{report.eval_images} ({report.eval_source})",
            "checkpoints": _checkpoints(report),
            "eval_loss_by_step": _plot(report.loss_by_step_path, "eval losses by step"),
            "clip_score_base": report.base_clip.mean if report.base_clip else None,
            "clip_score_lora": report.lora_clip.mean if report.lora_clip else None,
            "clip_scores": _clip_scores(report),
            "scores": _scores(report),
            "memorised_pairs": _plot(
                memorisation.sheet_path if memorisation else None,
                "generated images beside the most similar training images",
            ),
            "eval_loss_by_timestep": _plot(report.loss_plot_path, "eval loss by timestep"),
            "change_since_release": markdown_table(("metric", "change"), changes) if changes else None,
            "report": dg.MetadataValue.path(report.report_path),
            "seconds": report.seconds,
            "reused": report.reused,
        }
    )


def history_table(rows: Sequence[HistoryRow]) -> dg.MetadataValue:
    """Return the latest evaluations of a project, the last one first."""
    header = (
        *("date", "run", "step", "base loss", "LoRA loss", "difference", "gap", "scores"),
        *("failed checks", "released", "changes"),
    )
    return markdown_table(
        header,
        [
            (
                row.date[:16].replace("T", " "),
                row.run_identity[:16],
                row.step,
                "" if row.base_loss is None else row.base_loss,
                "" if row.lora_loss is None else row.lora_loss,
                _difference(row.difference) or "",
                describe_gap(row.gap),
                ", ".join(f"{name} {value:.4g}" for name, value in row.scores.items()),
                ", ".join(row.verdict) or "none",
                row.released or "",
                "; ".join(row.differs),
            )
            for row in reversed(rows[-MAX_HISTORY:])
        ],
    )


def describe_gap(gap: ProbeGap | None) -> str:
    """Return an over-fitting gap with its standard error; an empty string if it was not measured."""
    if gap is None:
        return ""
    error = "" if gap.standard_error is None else f" ± {gap.standard_error:.4f}"
    return f"{gap.mean:+.4f}{error}"


def _checkpoints(report: EvaluationReport) -> dg.MetadataValue | None:
    if not report.checkpoints:
        return None
    header = ("step", "weights", "held-out loss", "training loss", "to base", "to best", "gap", "selected")
    rows = [
        (
            each.step,
            each.weights,
            each.held_out.mean,
            each.probe.mean if each.probe else "",
            describe_difference(each.to_base),
            _difference(each.to_best) or "",
            describe_gap(each.gap),
            "yes" if (each.step, each.weights) == (report.step, report.weights) else "",
        )
        for each in report.checkpoints
    ]
    return markdown_table(header, rows)


def _clip_scores(report: EvaluationReport) -> dg.MetadataValue | None:
    scores: list[tuple[str, ClipSummary | None]] = [
        ("base", report.base_clip),
        (KIND_LABELS[report.weights_kind], report.lora_clip),
    ]
    rows = [(name, clip.min, clip.mean, clip.max, clip.std) for name, clip in scores if clip]
    header = ("CLIP score", "minimum", "mean", "maximum", "standard deviation")
    return markdown_table(header, rows) if rows else None


def _scores(report: EvaluationReport) -> dg.MetadataValue | None:
    scores = report.scores
    if scores is None:
        return None
    pairs: list[tuple[str, ScorePair | None]] = [
        ("clip", scores.clip),
        ("fidelity", scores.fidelity),
        ("diversity", scores.diversity),
    ]
    rows: list[tuple[object, ...]] = [
        (
            name,
            pair.base,
            pair.lora,
            describe_difference(pair.difference),
            "" if pair.ceiling is None else pair.ceiling,
            scores.notes.get(name, ""),
        )
        for name, pair in pairs
        if pair is not None
    ]
    if scores.cmmd_lora is not None:
        rows.append(("cmmd", _cmmd(scores.cmmd_base), _cmmd(scores.cmmd_lora), "", "", scores.cmmd_lora.text))
    rows += [(name, "", "", "", "", reason) for name, reason in sorted(scores.omitted.items())]
    return markdown_table(("score", "base", "LoRA", "difference", "ceiling", "note"), rows)


def _cmmd(cmmd: Cmmd | None) -> object:
    return "" if cmmd is None or cmmd.value is None else cmmd.value


def _difference(difference: PairedDifference | None) -> str | None:
    return describe_difference(difference) if difference else None


def _plot(path: str | None, alt: str) -> dg.MetadataValue | None:
    return inline_image(path, alt) if path else None


def _page(path: str | None) -> dg.MetadataValue | None:
    return dg.MetadataValue.url(Path(path).resolve().as_uri()) if path else None


def _path(path: str | None) -> dg.MetadataValue | None:
    return dg.MetadataValue.path(path) if path else None
