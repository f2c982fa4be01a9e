"""The evaluation as two self-contained HTML pages: report.html, and blind_ab.html for blind votes. Imports no torch.

A page is a template in `pages` with one JSON object in it. It loads nothing, neither from a network nor from files beside it, so that it
can be sent to somebody. The pages contain captions and training images, and are not part of a release.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from PIL import Image

from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    CheckpointLoss,
    EvaluationReport,
    Scores,
    ValidationImage,
)
from sdxl_pipeline.training.logging.run_logs import EvalRow

PAGES: Final = Path(__file__).with_name("pages")
PLACEHOLDER: Final = '"__DATA__"'
REPORT_PAGE, BLIND_PAGE = "report.html", "blind_ab.html"
IMAGE_BYTES: Final = 20_000_000
"""Most bytes of images in a page; if all images together are larger, they are scaled down."""
EDGES: Final = (512, 384, 256, 160, 96)
"""Longest edges of an image in a page, in pixels; the first that fits is used. Smaller images keep their size."""
QUALITY: Final = 88

MIN_EVAL_IMAGES: Final = 4
"""With fewer held-out images no statement on over-fitting is made."""

State = Literal["good", "warning", "bad", "unknown"]


class PagePaths(NamedTuple):
    """The written pages."""

    report: Path
    blind_ab: Path | None
    """None without two gallery images of one prompt."""


class Finding(NamedTuple):
    """One line of the verdict."""

    state: State
    title: str
    text: str


class Column(NamedTuple):
    """One column of the gallery: the base model (step 0), a checkpoint, or the selected checkpoint at another strength."""

    step: int
    scale: float


def write_pages(
    report: EvaluationReport,
    folder: Path,
    *,
    title: str,
    gallery: Sequence[ValidationImage] = (),
    training_losses: Iterable[EvalRow] = (),
    settings: Mapping[str, Any] | None = None,
    images_by_dataset: Mapping[str, tuple[int, int]] | None = None,
    training_images: Mapping[str, Path] | None = None,
    image_bytes: int = IMAGE_BYTES,
) -> PagePaths:
    """Write report.html and blind_ab.html to `folder`, and return their paths.

    `gallery` has the images of other checkpoints and strengths than the report's own; `training_losses` the eval losses measured during
    the training; `settings` those to list, which should contain no local path; `images_by_dataset` the (trained, held-out) images;
    `training_images` the files of the memorised pairs' `nearest`. Fields of the report that are None leave out their section. Images in a
    page take at most `image_bytes`, as WebP in data URIs.
    """
    images = _unique_images([*report.images, *gallery])
    step = selected_step(report)
    columns = gallery_columns(images, step)
    pairs = report.memorisation.pairs if report.memorisation is not None else ()
    nearest = {pair.nearest: str((training_images or {}).get(pair.nearest, pair.nearest)) for pair in pairs}
    files = [image.path for image in images] + [
        path for pair in pairs for path in (pair.image_path, nearest[pair.nearest])
    ]
    uris = data_uris(files, image_bytes)
    prompts = _prompts(images, columns, uris)
    shared = {
        "title": title,
        "label": KIND_LABELS[report.weights_kind],
        "identity": report.identity,
        "columns": [_column(column, step) for column in columns],
        "prompts": prompts,
        "omitted": sum(uri is None for uri in uris.values()),
    }
    verdict = findings(report)
    content = shared | {
        "headline": headline(verdict, step),
        "findings": [finding._asdict() for finding in verdict],
        "selection": report.selected.text if report.selected is not None else None,
        "facts": _facts(report),
        "curve": loss_curve(report, training_losses),
        "checkpoints": _checkpoint_rows(report),
        "timesteps": _timesteps(report),
        "scores": _score_rows(report.scores),
        "memorisation": _memorisation(report, uris, nearest),
        "settings": [[key, _text(value)] for key, value in (settings or {}).items()],
        "data": [[name, *counts] for name, counts in (images_by_dataset or {}).items()],
    }
    path = folder / REPORT_PAGE
    write_text_atomic(path, render(REPORT_PAGE, content))
    if len(columns) < 2:
        return PagePaths(path, None)
    blind = folder / BLIND_PAGE
    write_text_atomic(blind, render(BLIND_PAGE, shared | {"seed": int(report.identity[:8], 36) % 10**6}))
    return PagePaths(path, blind)


def render(page: str, content: Mapping[str, Any]) -> str:
    """Return a template of `pages` with `content` in it; "<" is escaped, so that no text of it can end the script element."""
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _template(page).replace(PLACEHOLDER, data.replace("<", "\\u003c"))


@cache
def _template(page: str) -> str:
    return (PAGES / page).read_text(encoding="utf-8")


def selected_step(report: EvaluationReport) -> int:
    """Return the step of the selected checkpoint; that of the newest image in reports without a selection."""
    if report.selected is not None:
        return report.selected.step
    return report.step or max((image.step for image in report.images), default=0)


def gallery_columns(images: Iterable[ValidationImage], selected: int) -> list[Column]:
    """Return the columns of the images: base model, checkpoints by step, and the selected one at other strengths."""
    found = {Column(image.step, image.scale) for image in images}
    return sorted(found, key=lambda column: (column.step == selected and column.scale != 1, column))


def findings(report: EvaluationReport) -> list[Finding]:
    """Return what the report says for and against a release, the most serious first."""
    rank: list[State] = ["bad", "warning", "unknown", "good"]
    found = [*_loss_findings(report), *_image_findings(report)]
    return sorted(found, key=lambda finding: rank.index(finding.state))


def headline(verdict: Sequence[Finding], step: int) -> dict[str, str]:
    """Return the verdict's sentence and its state, which is that of the most serious finding."""
    state = verdict[0].state if verdict else "unknown"
    texts: dict[State, str] = {
        "good": f"Step {step} is better than the base model",
        "warning": f"Step {step} can be released, with reservations",
        "bad": f"Step {step} should not be released",
        "unknown": f"Step {step} cannot be judged completely",
    }
    return {"state": state, "text": texts[state]}


def _loss_findings(report: EvaluationReport) -> Iterable[Finding]:
    difference = report.difference_to_base
    if difference is None or not difference.images:
        yield Finding("unknown", "Not compared with the base model", "The eval loss was not measured.")
    else:
        better = difference.is_lower
        yield Finding(
            "good" if better else "bad",
            "Better than the base model" if better else "Not measurably better than the base model",
            f"Eval loss {describe_difference(difference)}.",
        )
    if report.overfitting is not None:
        late = report.overfitting.from_step
        over = late is not None and selected_step(report) >= late
        state: State = "warning" if over else "good" if report.overfitting.conclusive else "unknown"
        title = "Over-fitted" if over else "Not over-fitted" if state == "good" else "Over-fitting unknown"
        yield Finding(state, title, report.overfitting.text)
    elif report.eval_source == "training images" or report.eval_images < MIN_EVAL_IMAGES:
        yield Finding(
            "unknown",
            "Over-fitting unknown",
            f"The eval loss was measured on {report.eval_images} images ({report.eval_source}); at least {MIN_EVAL_IMAGES} held-out images are needed.",
        )
    if report.difference_to_release is not None and report.difference_to_release.images:
        worse = report.difference_to_release.is_higher
        yield Finding(
            "warning" if worse else "good",
            "Worse than the last release" if worse else "Not worse than the last release",
            f"Eval loss {describe_difference(report.difference_to_release)}.",
        )


def _image_findings(report: EvaluationReport) -> Iterable[Finding]:
    if report.broken_images:
        details = "; ".join(f"{item.name}: {item.reason}" for item in report.broken_images)
        yield Finding("bad", "Broken images", details)
    if (memorised := report.memorisation) is not None:
        over = memorised.is_over_limit
        yield Finding(
            "bad" if over else "good",
            "Training images are memorised" if over else "Not memorised",
            memorised.text,
        )
    if report.selected is not None:
        for veto in report.selected.vetoes:
            yield Finding("warning", f"Step {veto.step} was refused", veto.reason)


def data_uris(paths: Iterable[str], budget: int) -> dict[str, str | None]:
    """Return a WebP data URI of each distinct image, all together of at most `budget` bytes.

    All images get the largest edge of `EDGES` that fits. If the smallest does not, the last images get None, as do missing files.
    """
    images = {path: _open(Path(path)) for path in dict.fromkeys(paths)}
    for edge in EDGES:
        uris = {path: _data_uri(image, edge) if image else None for path, image in images.items()}
        if sum(len(uri) for uri in uris.values() if uri) <= budget:
            return uris
    used = 0
    for path, uri in uris.items():
        used += len(uri or "")
        uris[path] = uri if used <= budget else None
    return uris


def _open(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            # in the size of the largest edge: a gallery of hundreds of full images would fill the memory
            image.draft("RGB", (EDGES[0], EDGES[0]))
            image = image.convert("RGB")
            image.thumbnail((EDGES[0], EDGES[0]), Image.Resampling.LANCZOS)
            return image
    except OSError:
        return None


def _data_uri(image: Image.Image, edge: int) -> str:
    small = image.copy()
    small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _unique_images(images: Iterable[ValidationImage]) -> list[ValidationImage]:
    return list({(image.name, image.step, image.scale): image for image in images}.values())


def _prompts(
    images: Sequence[ValidationImage], columns: Sequence[Column], uris: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    prompts: dict[str, dict[str, Any]] = {}
    for image in images:
        prompt = prompts.setdefault(
            image.name,
            {"name": image.name, "text": image.prompt, "seed": image.seed, "images": [None] * len(columns)},
        )
        prompt["images"][columns.index(Column(image.step, image.scale))] = uris[image.path]
    return list(prompts.values())


def _column(column: Column, selected: int) -> dict[str, Any]:
    strength = f" × {column.scale:g}" if column.scale != 1 else ""
    return {
        "step": column.step,
        "scale": column.scale,
        "label": f"step {column.step}{strength}" if column.step else "base model",
        "selected": column == Column(selected, 1.0),
    }


def _facts(report: EvaluationReport) -> list[list[str]]:
    facts = [["Selected", f"step {selected_step(report)}, {_weights(report.weights)}"]]
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
    if report.base_loss is None:
        return None
    images = {name for name, _ in report.base_loss.by_image}
    points: dict[int, dict[str, Any]] = {}
    for row in training_losses:
        if row.step and {name for name, _ in row.loss.by_image} == images:
            probe = row.probe.mean if row.probe is not None else None
            points[row.step] = {
                "step": row.step,
                "heldOut": row.loss.mean,
                "probe": probe,
                "error": None,
                "kept": False,
            }
    for loss in _checkpoints(report):
        points[loss.step] = {
            "step": loss.step,
            "heldOut": loss.held_out.mean,
            "probe": loss.probe.mean if loss.probe is not None else None,
            "error": loss.to_base.standard_error,
            "kept": True,
        }
    if not points and report.lora_loss is not None:
        error = report.difference_to_base.standard_error if report.difference_to_base else None
        step = selected_step(report)
        points[step] = {
            "step": step,
            "heldOut": report.lora_loss.mean,
            "probe": None,
            "error": error,
            "kept": True,
        }
    return {
        "points": [points[step] for step in sorted(points)],
        "base": {
            "heldOut": report.base_loss.mean,
            "probe": report.base_probe.mean if report.base_probe is not None else None,
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


def _checkpoint_rows(report: EvaluationReport) -> list[dict[str, Any]]:
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
                    _weights(loss.weights),
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


def _timesteps(report: EvaluationReport) -> list[list[float]]:
    if report.base_loss is None or report.lora_loss is None:
        return []
    before, after = dict(report.base_loss.by_timestep), dict(report.lora_loss.by_timestep)
    return [[timestep, before[timestep], after[timestep]] for timestep in before if timestep in after]


def _score_rows(scores: Scores | None) -> dict[str, Any] | None:
    """Return the scores as a table: name, base model, trained model, difference, note."""
    if scores is None:
        return None
    rows = []
    for name, pair, note in (
        ("CLIP score", scores.clip, "how well images match their prompts; higher is better"),
        ("Subject fidelity", scores.fidelity, "similarity to the training images, relative to their own"),
        (
            "Diversity",
            scores.diversity,
            "mean distance of samples of one prompt; lower than the base model's is a sign of over-fitting",
        ),
    ):
        if pair is not None:
            ceiling = f"; of the training images themselves: {pair.ceiling:.3g}" if pair.ceiling else ""
            difference = describe_difference(pair.difference)
            rows.append([name, f"{pair.base:.4g}", f"{pair.lora:.4g}", difference, note + ceiling])
    base, trained = scores.cmmd_base, scores.cmmd_lora
    if base is not None and trained is not None:
        rows.append(
            [
                "CMMD",
                _cmmd(base),
                _cmmd(trained),
                "",
                "distance to the training images; lower is closer. " + trained.text,
            ]
        )
    return {
        "rows": rows,
        "omitted": [[name, reason] for name, reason in scores.omitted.items()],
        "models": [[name, model] for name, model in scores.models.items()],
    }


def _cmmd(cmmd: Any) -> str:
    if cmmd.value is None:
        return "–"
    interval = f" [{cmmd.interval[0]:.3f}, {cmmd.interval[1]:.3f}]" if cmmd.interval is not None else ""
    return f"{cmmd.value:.3f}{interval}"


def _memorisation(
    report: EvaluationReport, uris: Mapping[str, str | None], nearest: Mapping[str, str]
) -> dict[str, Any] | None:
    if (memorised := report.memorisation) is None:
        return None
    return {
        "text": memorised.text,
        "pairs": [
            {
                "sample": uris[pair.image_path],
                "nearest": uris[nearest[pair.nearest]],
                "text": ", ".join(
                    f"{name} {value:.2f}"
                    for name, value in (("similarity", pair.similarity), ("correlation", pair.correlation))
                    if value is not None
                ),
            }
            for pair in memorised.pairs
        ],
    }


def _weights(weights: str) -> str:
    return "EMA weights" if weights == "ema" else "trained weights"


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:+.2g}" + (f" ± {error:.1g}" if error is not None else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
