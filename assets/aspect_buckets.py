"""The crop plan: which bucket each picture goes to, how it is resized, where it is cropped, on which side it stands."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from assets import checks
from assets.keys import lane_key, version
from assets.show import dropped_table, picture
from sdxl_pipeline.images.crops import plan_crops
from sdxl_pipeline.images.digests import rows_digest
from sdxl_pipeline.images.pictures import bucket_histogram
from sdxl_pipeline.project.datasets import ImageDataset
from sdxl_pipeline.project.project import Project

CODE = "1"
SETTINGS = {
    "dataset_type",
    "resolution",
    "resolution_type",
    "crop",
    "crop_style",
    "crop_aspect",
    "minimum_image_size",
    "maximum_image_size",
    "target_downsample_size",
    "minimum_aspect_ratio",
    "maximum_aspect_ratio",
    "max_upscale_threshold",
    "aspect_bucket_alignment",
    "aspect_bucket_rounding",
}


def holdout_share(project: Project) -> float:
    """Share of each training dataset kept back for the eval loss: none when the project has an eval dataset."""
    return 0.0 if project.eval_datasets else project.training.eval_holdout_share


def build_aspect_buckets(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/aspect_buckets`."""
    key = lane_key(project, dataset, "aspect_buckets")
    share = holdout_share(project)
    geometry = dataset.model_dump(mode="json", include=SETTINGS)

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        ins={"scanned": dg.AssetIn(key=lane_key(project, dataset, "dataset"), dagster_type=pd.DataFrame)},
        code_version=version(CODE, [geometry, share, project.training.seed]),
        check_specs=checks.bucket_specs(key),
        description="A row per crop: bucket, resize, crop, original size, train or eval. Read by the VAE stage and by the size conditioning alike.",
    )
    def aspect_buckets(context: dg.AssetExecutionContext, scanned: pd.DataFrame) -> Iterator[Any]:
        kept = scanned[scanned["status"] == "kept"]
        rows, dropped = plan_crops(
            dataset, kept, project.training.seed, share, is_eval=dataset.dataset_type == "eval"
        )
        context.log.info(f"{len(rows)} crops planned, {len(dropped)} pictures filtered out.")
        batch_size = project.training.train_batch_size
        yield dg.MaterializeResult(
            value=rows,
            data_version=dg.DataVersion(rows_digest(rows)),
            metadata=_metadata(rows, dropped, dataset.repeats, batch_size),
            check_results=checks.check_buckets(rows, dropped, len(kept), batch_size),
        )

    return aspect_buckets


def _metadata(rows: pd.DataFrame, dropped: pd.DataFrame, repeats: int, batch_size: int) -> dict[str, Any]:
    train = rows[rows["split"] == "train"]
    metadata: dict[str, Any] = {
        "crops": len(rows),
        "train": len(train),
        "eval": len(rows) - len(train),
        "filtered_out": dropped_table(dropped),
    }
    if rows.empty:
        return metadata
    resized = rows["resized_h"] * rows["resized_w"]
    # Each bucket fills its last batch by wrapping around.
    per_bucket = train.groupby(["bucket_h", "bucket_w"]).size() * (repeats + 1)
    upscaled = (rows["resized_h"] > rows["source_h"]) | (rows["resized_w"] > rows["source_w"])
    return metadata | {
        "buckets": picture(bucket_histogram(rows), "pictures per bucket"),
        "cropped_away": float(1 - (rows["bucket_h"] * rows["bucket_w"]).sum() / resized.sum()),
        "upscaled": int(upscaled.sum()),
        "batches_per_epoch": int((-(-per_bucket // batch_size)).sum()),
    }
