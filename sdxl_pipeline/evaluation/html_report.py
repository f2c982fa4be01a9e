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
from typing import Any, Final, NamedTuple

from PIL import Image

from sdxl_pipeline.evaluation.page_content import (
    checkpoint_rows,
    facts,
    loss_curve,
    memorised_pairs,
    pair_files,
    score_table,
    setting_rows,
    timesteps,
)
from sdxl_pipeline.evaluation.verdict import findings, headline, selected_step
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
from sdxl_pipeline.runtime.specs import KIND_LABELS, ValidationImage
from sdxl_pipeline.training.logging.run_logs import EvalRow

PAGES: Final = Path(__file__).with_name("pages")
PLACEHOLDER: Final = '"__DATA__"'
REPORT_PAGE, BLIND_PAGE = "report.html", "blind_ab.html"
IMAGE_BYTES: Final = 20_000_000
"""Most bytes of images in a page; if all images together are larger, they are scaled down."""
EDGES: Final = (512, 384, 256, 160, 96)
"""Longest edges of an image in a page, in pixels; the first that fits is used. Smaller images keep their size."""
QUALITY: Final = 88


class PagePaths(NamedTuple):
    """The written pages."""

    report: Path
    blind_ab: Path | None
    """None without two gallery images of one prompt."""


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
    data_dirs: Mapping[str, str] | None = None,
    image_bytes: int = IMAGE_BYTES,
) -> PagePaths:
    """Write report.html and blind_ab.html to `folder`, and return their paths.

    `gallery` has the images of other checkpoints and strengths than the report's own; `training_losses` the eval losses measured during
    the training; `settings` those to list, which should contain no local path; `images_by_dataset` the (trained, held-out) images;
    `data_dirs` the folder of each dataset's images, for the training images of the memorisation. Fields of the report that are None leave
    out their section. Images in a page take at most `image_bytes`, as WebP in data URIs.
    """
    images = _unique_images([*report.images, *gallery])
    step = selected_step(report)
    columns = gallery_columns(images, step)
    pairs = pair_files(report, data_dirs or {})
    uris = data_uris(
        [*(image.path for image in images), *(path for pair in pairs for path in pair)], image_bytes
    )
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
        "facts": facts(report),
        "curve": loss_curve(report, training_losses),
        "checkpoints": checkpoint_rows(report),
        "timesteps": timesteps(report),
        "scores": score_table(report.scores),
        "memorisation": memorised_pairs(report, pairs, uris),
        "settings": setting_rows(settings or {}),
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


def gallery_columns(images: Iterable[ValidationImage], selected: int) -> list[Column]:
    """Return the columns of the images: base model, checkpoints by step, and the selected one at other strengths."""
    found = {Column(image.step, image.scale) for image in images}
    return sorted(found, key=lambda column: (column.step == selected and column.scale != 1, column))


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
        with Image.open(path) as file:
            # at the size of the largest edge: a gallery of hundreds of full images would fill the memory
            file.draft("RGB", (EDGES[0], EDGES[0]))
            image = file.convert("RGB")
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
