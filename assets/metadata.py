"""Metadata of assets: images, tables and lists small enough for the event log, and what is shown of datasets, plans, models and releases.

Full-size files are stored on disk. What is shown of a device stage is a method of its `StageAsset`.
"""

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.data.buckets.crop_plan import images_per_bucket
from sdxl_pipeline.data.captions.caption_filters import CaptionFilter
from sdxl_pipeline.data.quality.contact_sheets import (
    bucket_histogram,
    caption_length_histogram,
    contact_sheet,
    resolution_scatter,
    to_jpeg,
)
from sdxl_pipeline.data.sources import FetchResult
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.evaluation_report import HubRelease
from sdxl_pipeline.runtime.specs import TrainingPlan, TrainingSet

SAMPLES = 12
"""Images of a contact sheet."""
MAX_IMAGE_BYTES = 300_000
"""Largest JPEG in a metadata value: the event log's database grows by about four times its size."""
MAX_CARD_IMAGE_BYTES = 100_000
"""Largest JPEG of a model card, which has several."""
MAX_NAMES = 20

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)


def inline_image(image: Image.Image | Path | str, alt: str) -> dg.MetadataValue:
    """Return an image that the UI renders inline, as a JPEG of at most 300 KB."""
    return dg.MetadataValue.md(_encode_jpeg(image, alt, MAX_IMAGE_BYTES))


def model_card(path: Path) -> dg.MetadataValue:
    """Return a model card for the UI, which renders neither front matter nor images by relative path.

    Images beside the card are embedded as JPEGs of at most 100 KB; links to other files beside it become their names.
    """
    text = path.read_text(encoding="utf-8")
    body = text.split("\n---\n", 1)[-1] if text.startswith("---") else text

    def render(link: re.Match[str]) -> str:
        target = (path.parent / link["target"]).resolve()
        if not target.is_relative_to(path.parent.resolve()) or not target.exists():
            return link[0]
        if link["image"]:
            return _encode_jpeg(target, link["text"], MAX_CARD_IMAGE_BYTES)
        return f"`{link['target']}`"

    parts = _CODE.split(body.replace("<Gallery />", ""))  # only the Hub renders this tag
    return dg.MetadataValue.md(
        "".join(part if part.startswith("```") else _LINK.sub(render, part) for part in parts)
    )


def _encode_jpeg(image: Image.Image | Path | str, alt: str, max_bytes: int) -> str:
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    encoded = base64.b64encode(to_jpeg(image, max_bytes=max_bytes)).decode("ascii")
    return f"![{alt}](data:image/jpeg;base64,{encoded})"


def dropped_table(dropped: pd.DataFrame) -> dg.MetadataValue:
    """Return a table of dropped files: one row per reason, with its first names. `dropped` has the columns path, reason."""
    records = [
        dg.TableRecord(
            {
                "reason": str(reason),
                "files": len(rows),
                "names": ", ".join(rows["path"].head(MAX_NAMES))
                + (f" and {len(rows) - MAX_NAMES} more" if len(rows) > MAX_NAMES else ""),
            }
        )
        for reason, rows in dropped.groupby("reason", sort=True)
    ]
    columns = [
        dg.TableColumn("reason", "string"),
        dg.TableColumn("files", "int"),
        dg.TableColumn("names", "string"),
    ]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=columns))


def names_list(names: Iterable[str]) -> dg.MetadataValue:
    """Return a Markdown list of the first 20 names and the number of further ones."""
    names = list(names)
    lines = [f"- {name}" for name in names[:MAX_NAMES]]
    if len(names) > MAX_NAMES:
        lines.append(f"- and {len(names) - MAX_NAMES} more")
    return dg.MetadataValue.md("\n".join(lines) or "none")


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> dg.MetadataValue:
    """Return a Markdown table; floats have four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def drop_none(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that have a value, so that a rate that was not measured is absent rather than zero."""
    return {name: value for name, value in metadata.items() if value is not None}


def dataset_metadata(scanned: pd.DataFrame, folder: Path) -> dict[str, Any]:
    """Return counts, dropped files and images of a scanned dataset whose files are in `folder`."""
    kept = scanned[scanned["status"] == "kept"]
    uncaptioned = kept[kept["caption_status"] != "ok"]
    metadata: dict[str, Any] = {
        "found": len(scanned),
        "kept": len(kept),
        "captions": int(kept["captions"].map(len).sum()),
        "bytes": int(kept["size"].sum()),
        "dropped": dropped_table(scanned[scanned["status"] == "dropped"]),
    }
    if len(uncaptioned):  # images dropped for a missing caption are among the dropped files
        metadata["trained_without_caption"] = dropped_table(
            uncaptioned[["path"]].assign(reason="caption " + uncaptioned["caption_status"])
        )
    if kept.empty:
        return metadata
    sample = kept.iloc[:: max(1, len(kept) // SAMPLES)].head(SAMPLES)
    paths = [folder / path for path in sample["path"]]
    captions = [next(iter(texts), "") for texts in sample["captions"]]
    return metadata | {
        "sample": inline_image(contact_sheet(paths, captions), "some of the images with their captions"),
        "resolutions": inline_image(resolution_scatter(kept), "width and height of the images"),
        "caption_lengths": inline_image(caption_length_histogram(kept), "caption lengths"),
    }


def download_metadata(fetched: FetchResult, source: str) -> dict[str, Any]:
    """Return what was downloaded from `source`."""
    return drop_none(
        {
            "revision": fetched.revision,
            "fetched_from": source,
            "files_at_source": fetched.files,
            "downloaded": fetched.downloaded,
            "downloaded_bytes": fetched.downloaded_bytes,
            "download_mb_per_second": fetched.downloaded_bytes / 1e6 / fetched.seconds
            if fetched.downloaded and fetched.seconds
            else None,
            "failed_downloads": len(fetched.failed),
        }
    )


def caption_filter_metadata(caption_filter: CaptionFilter) -> dict[str, Any]:
    """Return the number of a caption filter's lines, and the lines that are not valid regular expressions."""
    literal = caption_filter.literal_lines
    return drop_none(
        {
            "caption_filter_lines": len(caption_filter.rules),
            "literal_filter_lines": names_list(f"`{line}`" for line in literal) if literal else None,
        }
    )


def mask_dataset_metadata(scanned: pd.DataFrame) -> dict[str, Any]:
    """Return counts and dropped files of a scanned dataset of masks."""
    kept = scanned[scanned["status"] == "kept"]
    return {
        "found": len(scanned),
        "kept": len(kept),
        "bytes": int(kept["size"].sum()),
        "dropped": dropped_table(scanned[scanned["status"] == "dropped"]),
    }


def crop_plan_metadata(
    rows: pd.DataFrame, dropped: pd.DataFrame, repeats: int, batch_size: int
) -> dict[str, Any]:
    """Return counts and the bucket histogram of a crop plan; `dropped` are the images that the filters removed."""
    train = rows[rows["split"] == "train"]
    metadata: dict[str, Any] = {
        "crops": len(rows),
        "train": len(train),
        "eval": len(rows) - len(train),
        "trained_images": int(train["path"].nunique()),
        "held_out_images": len(rows) - len(train),  # each of them has one crop
        "filtered_out": dropped_table(dropped),
    }
    if rows.empty:
        return metadata
    resized = rows["resized_h"] * rows["resized_w"]
    # An epoch uses one crop of each image, in turn; the last batch of a bucket is smaller, or filled by repeated images.
    image_index = (train["crop_index"] == 0).cumsum().to_numpy()
    crops = np.bincount(image_index)[1:]
    shares = train[["bucket_h", "bucket_w"]].assign(share=(repeats + 1) / crops[image_index - 1])
    samples = shares.groupby(["bucket_h", "bucket_w"])["share"].sum().round(6)
    images = images_per_bucket(rows)
    short = [(width, height) for height, width in images.index[images < batch_size]]
    upscaled = (rows["resized_h"] > rows["source_h"]) | (rows["resized_w"] > rows["source_w"])
    return metadata | {
        "buckets": inline_image(bucket_histogram(rows, short), "crops per bucket"),
        "crops_per_image": float(crops.mean()) if len(crops) else 1.0,
        "flipped": int(rows["flipped"].sum()),
        "cropped_area_share": float(1 - (rows["bucket_h"] * rows["bucket_w"]).sum() / resized.sum()),
        "upscaled": int(upscaled.sum()),
        "batches_per_epoch": int(np.ceil(samples / batch_size).sum()),
    }


def training_plan_metadata(plan: TrainingPlan) -> dict[str, Any]:
    """Return steps, and images and appearances by dataset."""
    names = sorted(plan.trained_images.keys() | plan.held_out_images.keys())
    return {
        "steps": plan.steps,
        "batches_per_epoch": plan.batches_per_epoch,
        "images_per_epoch": plan.images_per_epoch,
        "datasets": markdown_table(
            ("dataset", "trained images", "held-out images", "appearances per epoch", "repeats raised to"),
            [
                (
                    name,
                    plan.trained_images.get(name, 0),
                    plan.held_out_images.get(name, 0),
                    appearances_range(plan.appearances.get(name)),
                    plan.raised_repeats.get(name, ""),
                )
                for name in names
            ],
        ),
    }


def training_set_metadata(training_set: TrainingSet) -> dict[str, Any]:
    """Return what each dataset contributes to the training."""
    return {
        "datasets": markdown_table(
            ("dataset", "crops", "captions", "repeats", "probability", "masks", "regularisation"),
            [
                (
                    dataset.dataset_id,
                    dataset.latents.planned,
                    dataset.text_embeds.captions,
                    dataset.repeats,
                    dataset.probability,
                    dataset.masks.kind if dataset.masks else "",
                    "yes" if dataset.is_regularisation else "",
                )
                for dataset in training_set.datasets
            ],
        ),
    }


def base_model_metadata(
    model: ResolvedModel, scoring_model: str | None, preview_model: str | None
) -> dict[str, Any]:
    """Return source, revision and digests of the base model, and the paths of the models for scoring and previews."""
    return drop_none(
        {
            "source": model.source,
            "path": dg.MetadataValue.path(model.path),
            "revision": model.revision,
            "VAE": model.vae_source,
            "scoring_model": scoring_model,
            "preview_model": preview_model,
            "digests": markdown_table(("component", "sha256"), sorted(model.digests.items())),
        }
    )


def release_metadata(release: HubRelease, gallery_path: str, is_current: bool) -> dict[str, Any]:
    """Return which run is released, where it is published and stored, with its gallery and model card.

    `is_current` is whether the run is the value of `lora`.
    """
    run = release.run_identity
    return drop_none(
        {
            "run": run and run + ("" if is_current else " (not the current LoRA)"),
            "step": release.step,
            "published": release.url or "no: push_to_hub is off; the folder is ready on disk",
            "repository": release.repo_id,
            "commit": release.commit,
            "tag": release.tag,
            "link": dg.MetadataValue.url(release.url) if release.url else None,
            "folder": dg.MetadataValue.path(release.folder),
            "files": ", ".join(release.files),
            "gallery": inline_image(gallery_path, "base beside LoRA"),
            "model_card": model_card(Path(release.model_card_path)),
        }
    )


def appearances_range(range_: tuple[int, int] | None) -> str:
    """Return how often each image of a dataset appears in an epoch: "1", or "1 to 4" where images differ."""
    if range_ is None:
        return ""
    fewest, most = range_
    return str(fewest) if fewest == most else f"{fewest} to {most}"
