"""The tables and curves of report.html as plain data. Imports no torch."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.evaluation.report import describe_difference, rows_of_images
from sdxl_pipeline.evaluation.verdict import selected_step
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    Cmmd,
    EvaluationReport,
    LossSummary,
    Scores,
)
from sdxl_pipeline.training.logging.run_logs import EvalRow

MAX_PAIRS: Final = 24
"""Memorisation pairs in the page, the most similar ones."""


def facts(report: EvaluationReport) -> list[list[str]]:
    """Return the key numbers as names and texts."""
    facts = [["Selected", f"step {selected_step(report)}, {weights_label(report.weights)}"]]
    if report.base_loss is not None and report.lora_loss is not None:
        facts.append(["Eval loss", f"{report.base_loss.mean:.4g} → {report.lora_loss.mean:.4g}"])
    own = next((loss for loss in _checkpoints(report) if loss.step == selected_step(report)), None)
    if own is not None and own.gap is not None:
        facts.append(["Held-out minus train probe", _with_error(own.gap.mean, own.gap.standard_error)])
    if (memorised := report.memorisation) is not None:
        facts.append(["Memorised samples", f"{memorised.flagged} of {memorised.samples}"])
    facts.append(["Evaluated on", f"{report.eval_images} images, {report.eval_source}"])
    return facts


def loss_curve(report: EvaluationReport, training_losses: Iterable[EvalRow] = ()) -> dict[str, Any] | None:
    """Return the losses by step as plain data; None without any.

    Losses measured during the training are added at steps without a checkpoint if they are of the same images.
    """
    if report.base_loss is None or not math.isfinite(report.base_loss.mean):
        return None
    points: dict[int, dict[str, Any]] = {}
    for row in rows_of_images(training_losses, report.base_loss, report.base_probe):
        points[row.step] = {
            "step": row.step,
            "heldOut": row.loss.mean,
            "probe": _mean(row.probe),
            "error": None,
            "kept": False,
        }
    for loss in _checkpoints(report):
        points[loss.step] = {
            "step": loss.step,
            "heldOut": loss.held_out.mean,
            "probe": _mean(loss.probe),
            "error": _finite(loss.to_base.standard_error),
            "kept": True,
        }
    if not points and report.lora_loss is not None:
        error = _finite(report.difference_to_base.standard_error) if report.difference_to_base else None
        step = selected_step(report)
        points[step] = {
            "step": step,
            "heldOut": report.lora_loss.mean,
            "probe": None,
            "error": error,
            "kept": True,
        }
    return {
        "points": [point for _, point in sorted(points.items()) if math.isfinite(point["heldOut"])],
        "base": {
            "heldOut": report.base_loss.mean,
            "probe": _mean(report.base_probe),
        },
        "heldOutLabel": "training images" if report.eval_source == "training images" else "held-out images",
        "selected": selected_step(report),
        "overfittedFrom": report.overfitting.from_step if report.overfitting is not None else None,
    }


def _checkpoints(report: EvaluationReport) -> list[CheckpointLoss]:
    """Return the losses of the checkpoints, of the weights that can be selected, by step."""
    return sorted(
        (loss for loss in report.checkpoints if loss.weights == report.weights), key=lambda loss: loss.step
    )


def checkpoint_rows(report: EvaluationReport) -> list[dict[str, Any]]:
    """Return the table of the checkpoints: the texts of each row, and whether it is the selected one."""
    selected = report.selected
    rows = []
    for loss in sorted(report.checkpoints, key=lambda loss: (loss.step, loss.weights != report.weights)):
        selectable = loss.weights == report.weights
        notes = []
        if selected is not None and selectable:
            notes = [
                *(["selected"] if loss.step == selected.step else []),
                *(["lowest loss"] if loss.step == selected.best_step else []),
                *(["within one standard error"] if loss.step in selected.within_one_error else []),
                *(f"refused: {veto.reason}" for veto in selected.vetoes if veto.step == loss.step),
            ]
        rows.append(
            {
                "cells": [
                    str(loss.step),
                    weights_label(loss.weights),
                    f"{loss.held_out.mean:.5f}",
                    f"{loss.probe.mean:.5f}" if loss.probe is not None else "–",
                    _with_error(loss.to_base.mean, loss.to_base.standard_error),
                    _with_error(loss.to_best.mean, loss.to_best.standard_error)
                    if loss.to_best is not None and loss.to_best.mean
                    else "–",
                    _with_error(loss.gap.mean, loss.gap.standard_error) if loss.gap is not None else "–",
                    ", ".join(notes),
                ],
                "selected": "selected" in notes,
            }
        )
    return rows


def timesteps(report: EvaluationReport) -> list[list[float]]:
    """Return (timestep, loss of the base model, of the selected checkpoint), without losses that are not finite."""
    if report.base_loss is None or report.lora_loss is None:
        return []
    before, after = dict(report.base_loss.by_timestep), dict(report.lora_loss.by_timestep)
    rows = [[timestep, before[timestep], after[timestep]] for timestep in before if timestep in after]
    return [row for row in rows if all(map(math.isfinite, row))]


def score_table(scores: Scores | None) -> dict[str, Any] | None:
    """Return the scores as a table: name, base model, trained model, difference, note; and sentences on what is not reported."""
    if scores is None:
        return None
    rows = []
    for key, label, pair, note in (
        ("clip", "CLIP score", scores.clip, "how well images match their prompts; higher is better"),
        ("fidelity", "Subject fidelity", scores.fidelity, "similarity to the training images"),
        ("diversity", "Diversity", scores.diversity, "mean distance of images of one prompt"),
    ):
        if pair is not None:
            ceiling = f"; of the training images themselves: {pair.ceiling:.3g}" if pair.ceiling else ""
            difference = describe_difference(pair.difference)
            text = f"{note}{ceiling}. {scores.notes.get(key, '')}".strip()
            rows.append([label, f"{pair.base:.4g}", f"{pair.lora:.4g}", difference, text])
    base, trained = scores.cmmd_base, scores.cmmd_lora
    if base is not None and trained is not None:
        note = (
            f"distance to the training images; lower is closer. {trained.text} {scores.notes.get('cmmd', '')}"
        )
        rows.append(["CMMD", _cmmd(base), _cmmd(trained), "", note.strip()])
    return {
        "rows": rows,
        "omitted": list(scores.omitted.values()),
        "models": [[name, model] for name, model in scores.models.items()],
    }


def _cmmd(cmmd: Cmmd) -> str:
    if cmmd.value is None:
        return "–"
    interval = f" [{cmmd.interval[0]:.3f}, {cmmd.interval[1]:.3f}]" if cmmd.interval is not None else ""
    return f"{cmmd.value:.3f}{interval}"


def pair_files(report: EvaluationReport, data_dirs: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the files of the memorisation's pairs: sample and training image, which is named by its dataset and path."""
    pairs = report.memorisation.pairs[:MAX_PAIRS] if report.memorisation is not None else ()
    return [(pair.image_path, _training_file(pair.nearest, data_dirs)) for pair in pairs]


def _training_file(name: str, data_dirs: Mapping[str, str]) -> str:
    datasets = [dataset for dataset in data_dirs if name.startswith(f"{dataset}/")]
    if not datasets:
        return name
    dataset = max(datasets, key=len)  # an id may contain slashes
    return str(Path(data_dirs[dataset]) / name.removeprefix(f"{dataset}/"))


def memorised_pairs(
    report: EvaluationReport, files: Iterable[tuple[str, str]], uris: Mapping[str, str | None]
) -> dict[str, Any] | None:
    """Return the memorisation's sentence and its pairs, as data URIs with their similarity."""
    if (memorised := report.memorisation) is None:
        return None
    pairs = []
    for pair, (sample, nearest) in zip(memorised.pairs, files, strict=False):
        similarity = f"similarity {pair.similarity:.2f}, " if pair.similarity is not None else ""
        copy = "copy: " if pair.flagged else ""
        text = f"{copy}{similarity}correlation {pair.correlation:.2f}, {pair.nearest}"
        pairs.append({"sample": uris[sample], "nearest": uris[nearest], "text": text})
    return {"text": memorised.text, "pairs": pairs}


def weights_label(weights: str) -> str:
    """Return the display name of trained or EMA weights."""
    return "EMA weights" if weights == "ema" else "trained weights"


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:+.2g}" + (f" ± {error:.1g}" if error is not None else "")


def _mean(loss: LossSummary | None) -> float | None:
    return _finite(loss.mean) if loss is not None else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def setting_rows(settings: Mapping[str, Any]) -> list[list[str]]:
    """Return the settings as names and texts."""
    return [
        [key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for key, value in settings.items()
    ]
