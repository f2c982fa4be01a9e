"""The crop plan: which bucket each image goes to, how it is resized, where it is cropped, on which side it stands."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd

from assets.asset_keys import dataset_key, version
from assets.checks import data_checks
from assets.errors import user_errors_as_failures
from assets.metadata import dropped_table, inline_image
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.buckets.bucket_sizes import filter_reasons
from sdxl_pipeline.data.buckets.crop_plan import images_per_bucket, plan_crops
from sdxl_pipeline.data.buckets.face_detection import DETECTOR, find_faces, require_detector
from sdxl_pipeline.data.buckets.holdout import hold_out
from sdxl_pipeline.data.quality.contact_sheets import bucket_histogram
from sdxl_pipeline.data.scan.table_digests import rows_digest

CODE = "3"
SETTINGS = keys_used_by(ImageDataset, "aspect_buckets")
PROGRESS_SECONDS = 10.0


def holdout_share(project: Project, dataset: ImageDataset) -> float:
    """Share of a training dataset kept back for the eval loss: none when the project has an eval dataset.

    None of regularisation images either: of them the LoRA is to learn nothing, so no loss can say how well it did.
    """
    none = project.eval_datasets or dataset.is_regularisation_data
    return 0.0 if none else project.training.eval_holdout_share


def build_aspect_buckets(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/aspect_buckets`."""
    key = dataset_key(project, dataset, "aspect_buckets")
    share = holdout_share(project, dataset)
    held_out = share > 0 and dataset.dataset_type != "eval"
    geometry = dataset.model_dump(mode="json", include=SETTINGS)
    around_faces = dataset.crop and dataset.crop_style == "face"
    if around_faces:
        geometry["detector"] = DETECTOR

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        ins={"scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame)},
        code_version=version(CODE, [geometry, share, project.training.seed]),
        check_specs=data_checks.bucket_specs(key, held_out=held_out),
        description="A row per crop: bucket, resize, crop, original size, train or eval. Read by the VAE stage and by the size conditioning alike.",
    )
    def aspect_buckets(
        context: dg.AssetExecutionContext, storage: Storage, scanned: pd.DataFrame
    ) -> Iterator[Any]:
        kept = scanned[scanned["status"] == "kept"]
        faces = _find_faces(context, storage, project, dataset, kept) if around_faces else None
        is_eval = dataset.dataset_type == "eval"
        keys = frozenset() if is_eval else _held_out(project, dataset, kept, share)
        rows, dropped = plan_crops(dataset, kept, project.training.seed, keys, is_eval, faces)
        context.log.info(
            f"{len(rows)} crops planned, {len(dropped)} images filtered out, {len(keys)} images held out of training."
        )
        batch_size = project.training.train_batch_size
        metadata = _metadata(rows, dropped, dataset.repeats, batch_size)
        if faces is not None:
            faceless = faces.loc[faces["height"] == 0, "key"]
            metadata["images_without_face"] = int(kept["key"].isin(faceless).sum())
        yield dg.MaterializeResult(
            value=rows,
            data_version=dg.DataVersion(rows_digest(rows)),
            metadata=metadata,
            check_results=[
                *data_checks.check_buckets(rows, dropped, kept, batch_size, project.training.bucket_fill),
                *([data_checks.check_held_out(rows, kept, storage.data_dir(dataset))] if held_out else []),
            ],
        )

    return aspect_buckets


def _held_out(project: Project, dataset: ImageDataset, kept: pd.DataFrame, share: float) -> frozenset[str]:
    """Return the content keys to hold out. Their record is kept with the LoRAs they judge, not among what can be made again."""
    filtered = filter_reasons(dataset, kept["height"].to_numpy(), kept["width"].to_numpy()) != ""
    record = Path(project.training.output_dir) / "held_out" / f"{dataset.asset_name}.json"
    with user_errors_as_failures():
        return hold_out(kept[~filtered], share, record)


def _find_faces(
    context: dg.AssetExecutionContext,
    storage: Storage,
    project: Project,
    dataset: ImageDataset,
    kept: pd.DataFrame,
) -> pd.DataFrame:
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            context.log.info(f"{done} of {total} images searched for faces.")

    with user_errors_as_failures():
        require_detector(dataset)
        table = storage.work_dir(project.name, dataset.asset_name, "aspect_buckets") / "faces.parquet"
        return find_faces(storage.data_dir(dataset), kept, table, on_progress)


def _metadata(rows: pd.DataFrame, dropped: pd.DataFrame, repeats: int, batch_size: int) -> dict[str, Any]:
    train = rows[rows["split"] == "train"]
    metadata: dict[str, Any] = {
        "crops": len(rows),
        "train": len(train),
        "eval": len(rows) - len(train),
        "trained_images": int(train["path"].nunique()),
        "held_out_images": len(rows) - len(train),  # which have one crop each
        "filtered_out": dropped_table(dropped),
    }
    if rows.empty:
        return metadata
    resized = rows["resized_h"] * rows["resized_w"]
    # An epoch takes one crop of each image, the crops in turn; the last batch of a bucket is smaller, or filled by repeating images.
    image_of = (train["crop_index"] == 0).cumsum().to_numpy()
    crops = np.bincount(image_of)[1:]
    turns = train[["bucket_h", "bucket_w"]].assign(share=(repeats + 1) / crops[image_of - 1])
    draws = turns.groupby(["bucket_h", "bucket_w"])["share"].sum().round(6)
    images = images_per_bucket(rows)
    short = [(width, height) for height, width in images.index[images < batch_size]]
    upscaled = (rows["resized_h"] > rows["source_h"]) | (rows["resized_w"] > rows["source_w"])
    return metadata | {
        "buckets": inline_image(bucket_histogram(rows, short), "crops per bucket"),
        "crops_per_image": float(crops.mean()) if len(crops) else 1.0,
        "mirrored": int(rows["flipped"].sum()),
        "cropped_away": float(1 - (rows["bucket_h"] * rows["bucket_w"]).sum() / resized.sum()),
        "upscaled": int(upscaled.sum()),
        "batches_per_epoch": int(np.ceil(draws / batch_size).sum()),
    }
