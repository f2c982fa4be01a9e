"""The metadata of each asset, rendered from its value: a manifest, or a table of a dataset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from assets.metadata_values import (
    drop_none,
    dropped_table,
    inline_image,
    markdown_table,
    model_card,
    names_list,
)
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import images_per_bucket
from sdxl_pipeline.data.captions.caption_filters import CaptionFilter
from sdxl_pipeline.data.quality.contact_sheets import (
    bucket_histogram,
    caption_length_histogram,
    contact_sheet,
    resolution_scatter,
)
from sdxl_pipeline.data.scan.dataset_fingerprint import OVERRIDES_ENTRY
from sdxl_pipeline.data.sources import FetchResult
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.models.adapters.init_adapter_source import initial_adapter_digest
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.release_inputs import adapter_name
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    ClipSummary,
    EvaluationReport,
    HubRelease,
    LatentCache,
    SettingDifference,
    TextEmbedCache,
    TrainedLora,
    TrainingPlan,
    TrainingSet,
    TrainSpec,
)

SAMPLES = 12
"""Images of a contact sheet."""


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
                    _appearances(plan.appearances.get(name)),
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


def latent_metadata(cache: LatentCache) -> dict[str, Any]:
    """Return counts, throughput and statistics of a latent cache."""
    statistics = markdown_table(
        ("channel", "mean", "standard deviation"),
        [
            (channel, mean, std)
            for channel, (mean, std) in enumerate(zip(cache.latent_mean, cache.latent_std, strict=True))
        ],
    )
    return drop_none(
        {
            "encoded": cache.encoded,
            "reused": cache.reused,
            "deferred": cache.deferred or None,
            "failed": names_list(f"{item.name}: {item.reason}" for item in cache.failed),
            "images_per_second": cache.images_per_second,
            "vae_utilization": cache.vae_busy,
            "bytes": cache.bytes,
            "seconds": cache.seconds,
            "scaled_latents": statistics if cache.measured else None,
            "scaled_latents_measured": f"{cache.measured} of {cache.planned} crops"
            if cache.measured
            else None,
            "sample": inline_image(cache.sample_path, "crops beside their decoded latents")
            if cache.sample_path
            else None,
            "store": dg.MetadataValue.path(cache.store_root),
        }
    )


def text_embed_metadata(cache: TextEmbedCache) -> dict[str, Any]:
    """Return counts, throughput and truncated captions of a text embedding cache."""
    truncated = [
        f"{caption} **loses:** {tail}"
        for caption, tail in zip(cache.truncated, cache.truncated_tails, strict=True)
    ]
    return drop_none(
        {
            "captions": cache.captions,
            "encoded": cache.encoded,
            "reused": cache.reused,
            "deferred": cache.deferred or None,
            "truncated_count": cache.truncated_count,
            "truncated": names_list(truncated),
            "windows_of_77_tokens": cache.windows,
            "captions_per_second": cache.captions_per_second,
            "bytes": cache.bytes,
            "seconds": cache.seconds,
            "store": dg.MetadataValue.path(cache.store_root),
        }
    )


def lora_metadata(
    result: TrainedLora, spec: TrainSpec, differences: Sequence[SettingDifference]
) -> dict[str, Any]:
    """Return metrics, images, files and settings of a training; `differences` are its settings that differ from config.json."""
    masked = ", ".join(dataset.dataset_id for dataset in spec.datasets if dataset.masks)
    regularisation = ", ".join(dataset.dataset_id for dataset in spec.datasets if dataset.is_regularisation)
    objective = [(key, str(value)) for key, value in spec.settings.changed_objective.items()]
    grid = result.validation_sheet_path
    return drop_none(
        {
            "summary": lora_summary(result),
            "final_loss": result.final_loss,
            "eval_loss": result.eval_losses[-1][1] if result.eval_losses else None,
            "eval_losses": markdown_table(("step", "eval loss"), result.eval_losses)
            if result.eval_losses
            else None,
            "steps": result.steps,
            "skipped_steps": result.skipped_steps or None,
            "continued_from": f"step {result.ancestor.step} of the run {result.ancestor.identity[:16]}"
            if result.ancestor
            else None,
            "epochs": result.epochs,
            "images_seen": result.samples,
            "datasets": _trained_datasets(result),
            "masked_datasets": masked or None,
            "regularisation_datasets": regularisation or None,
            "objective": markdown_table(("setting", "value"), objective) if objective else None,
            "steps_per_second": result.steps_per_second,
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "memory": _memory(result),
            "trainable_parameters": result.trainable_parameters,
            "adapted_modules": result.adapted_modules,
            "loss_curve": inline_image(
                result.loss_curve_path, "loss, gradient norm and learning rate over steps"
            ),
            "validation": inline_image(grid, "validation images over steps") if grid else None,
            "weights": dg.MetadataValue.path(result.weights_path),
            "kohya_weights": dg.MetadataValue.path(result.kohya_path) if result.kohya_path else None,
            "kohya_dtype": result.kohya_dtype,
            "dora_approximation": markdown_table(
                ("approximation as a plain LoRA", "value"), sorted(result.dora_approximation.items())
            )
            if result.dora_approximation
            else None,
            "released_weights": result.released_weights,
            "metrics": dg.MetadataValue.path(result.metrics_path),
            "sha256": result.weights_sha256,
            "identity": result.identity,
            "setting_differences": _setting_differences(differences, result.overrides),
            OVERRIDES_ENTRY: ", ".join(each.setting for each in result.overrides) or None,
        }
        | _adapter(spec.settings)
    )


def lora_summary(result: TrainedLora) -> str:
    """Return one line on what a training did or reused."""
    if result.reused:
        return f"These inputs and settings were trained before ({result.identity[:12]}): reused, nothing trained."
    resumed = "" if result.resumed_from_step is None else f", resumed from step {result.resumed_from_step}"
    return f"{result.steps} steps in {result.seconds:.0f} s{resumed}, final loss {result.final_loss:.4f}."


def evaluation_metadata(report: EvaluationReport) -> dict[str, Any]:
    """Return losses, CLIP scores and plots of an evaluation."""
    base, lora = report.base_loss, report.lora_loss
    scores: list[tuple[str, ClipSummary | None]] = [
        ("base", report.base_clip),
        (KIND_LABELS[report.weights_kind], report.lora_clip),
    ]
    rows = [(name, clip.min, clip.mean, clip.max, clip.std) for name, clip in scores if clip]
    header = ("CLIP score", "minimum", "mean", "maximum", "standard deviation")
    changes = sorted(report.change_since_release.items())
    return drop_none(
        {
            "gallery": inline_image(report.gallery_path, f"base beside {KIND_LABELS[report.weights_kind]}"),
            "eval_loss_base": base.mean if base else None,
            "eval_loss_lora": lora.mean if lora else None,
            "eval_loss_ratio": lora.mean / base.mean if base and lora else None,
            "difference_to_base": describe_difference(report.difference_to_base)
            if report.difference_to_base
            else None,
            "difference_to_release": describe_difference(report.difference_to_release)
            if report.difference_to_release
            else None,
            "eval_images": f"{report.eval_images} ({report.eval_source})",
            "clip_score_base": report.base_clip.mean if report.base_clip else None,
            "clip_score_lora": report.lora_clip.mean if report.lora_clip else None,
            "clip_scores": markdown_table(header, rows) if rows else None,
            "eval_loss_by_timestep": inline_image(report.loss_plot_path, "eval loss by timestep")
            if report.loss_plot_path
            else None,
            "change_since_release": markdown_table(("metric", "change"), changes) if changes else None,
            "report": dg.MetadataValue.path(report.report_path),
            "seconds": report.seconds,
            "reused": report.reused,
        }
    )


def release_metadata(release: HubRelease, gallery_path: str) -> dict[str, Any]:
    """Return where a release is published and stored, with its gallery and model card."""
    return drop_none(
        {
            "published": release.url or "no: push_to_hub is off; the folder is ready on disk",
            "repository": release.repo_id,
            "commit": release.commit,
            "link": dg.MetadataValue.url(release.url) if release.url else None,
            "folder": dg.MetadataValue.path(release.folder),
            "files": ", ".join(release.files),
            "gallery": inline_image(gallery_path, "base beside LoRA"),
            "model_card": model_card(Path(release.model_card_path)),
        }
    )


def _adapter(settings: TrainingSettings) -> dict[str, Any]:
    if settings.model_type != "lora":
        return {}
    return {
        "adapter": adapter_name(settings).partition(" ")[2],
        "init_lora_sha256": initial_adapter_digest(settings.init_lora),
    }


def _setting_differences(
    differences: Sequence[SettingDifference], overrides: Sequence[SettingDifference]
) -> dg.MetadataValue | None:
    """Return the settings that differ from config.json, and whether each changes the weights (is one of `overrides`)."""
    rows = [
        (f"`{each.setting}`", each.configured, each.used, "yes" if each in overrides else "no")
        for each in differences
    ]
    header = ("setting", "configured", "this run", "changes the weights")
    return markdown_table(header, rows) if rows else None


def _memory(result: TrainedLora) -> dg.MetadataValue | None:
    """Return the estimate made before the first step beside the measured peak, in GiB."""
    if result.estimated_memory_bytes is None:
        return None
    rows = [(name, size / 2**30) for name, size in result.memory_estimate.items()]
    peaks = [
        ("**estimated peak**", result.estimated_memory_bytes / 2**30),
        ("**measured peak**", result.peak_memory_bytes / 2**30),
    ]
    return markdown_table(("memory of the main process", "GiB"), [*rows, *peaks])


def _trained_datasets(result: TrainedLora) -> dg.MetadataValue | None:
    if not result.images_per_epoch:
        return None
    header = (
        "dataset",
        "trained images",
        "held-out images",
        "images per epoch",
        "appearances per epoch",
        "crops per image",
        "repeats raised to",
    )
    rows = [
        (
            name,
            result.trained_images.get(name, ""),
            result.held_out_images.get(name, 0),
            f"{images:,.0f}",
            _appearances(result.appearances.get(name)),
            result.crops_per_image[name],
            result.raised_repeats.get(name, ""),
        )
        for name, images in sorted(result.images_per_epoch.items())
    ]
    return markdown_table(header, rows)


def _appearances(range_: tuple[int, int] | None) -> str:
    """Return how often each image of a dataset appears in an epoch: "1", or "1 to 4" where images differ."""
    if range_ is None:
        return ""
    fewest, most = range_
    return str(fewest) if fewest == most else f"{fewest} to {most}"
