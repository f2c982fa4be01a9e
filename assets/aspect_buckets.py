"""The crop plan: bucket, resize, crop and split of each image."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, version
from assets.checks import data_checks
from assets.event_log import log_progress, user_errors_as_failures
from assets.metadata import crop_plan_metadata
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.buckets.bucket_sizes import filter_reasons
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.buckets.face_detection import DETECTOR, find_faces, require_detector
from sdxl_pipeline.data.buckets.holdout import hold_out
from sdxl_pipeline.data.scan.dataset_fingerprint import rows_digest

CODE = "3"
SETTINGS = keys_used_by(ImageDataset, "aspect_buckets")


def holdout_share(project: Project, dataset: ImageDataset) -> float:
    """Return the share of a training dataset that is held out for the eval loss.

    0 when the project has an eval dataset, and for regularisation images: their target is the base model's prediction, so their loss
    does not measure the training.
    """
    excluded = project.eval_datasets or dataset.is_regularisation_data
    return 0.0 if excluded else project.training.eval_holdout_share


def build_aspect_buckets(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_aspect_buckets`."""
    key = dataset_key(project, dataset, "aspect_buckets")
    share = holdout_share(project, dataset)
    held_out = share > 0 and dataset.dataset_type != "eval"
    geometry = dataset.model_dump(mode="json", include=SETTINGS)
    uses_faces = dataset.crop and dataset.crop_style == "face"
    if uses_faces:
        geometry["detector"] = DETECTOR

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "pandas", "parquet", dataset=dataset),
        ins={"scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame)},
        code_version=version(CODE, [geometry, share, project.training.seed]),
        check_specs=[
            check.spec(key)
            for check in (*data_checks.BUCKET_CHECKS, *([data_checks.NO_EVAL_LEAKAGE] if held_out else []))
        ],
        description="A row per crop: bucket, resize, crop, original size, train or eval. Input of the VAE stage and of the size conditioning.",
    )
    def aspect_buckets(
        context: dg.AssetExecutionContext, storage: Storage, scanned: pd.DataFrame
    ) -> Iterator[dg.MaterializeResult[pd.DataFrame]]:
        kept = scanned[scanned["status"] == "kept"]
        faces = _find_faces(context, storage, project, dataset, kept) if uses_faces else None
        is_eval = dataset.dataset_type == "eval"
        keys = frozenset() if is_eval else _held_out(project, dataset, kept, share)
        rows, dropped = plan_crops(dataset, kept, project.training.seed, keys, is_eval, faces)
        context.log.info(
            f"{len(rows)} crops planned, {len(dropped)} images filtered out, {len(keys)} images held out of training."
        )
        batch_size = project.training.train_batch_size
        metadata = crop_plan_metadata(rows, dropped, dataset.repeats, batch_size)
        if faces is not None:
            without_face = faces.loc[faces["height"] == 0, "key"]
            metadata["images_without_face"] = int(kept["key"].isin(without_face).sum())
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
    """Return the content keys to hold out.

    Their record is stored beside the LoRAs that are evaluated on them rather than in the cache, which may be deleted.
    """
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
    with user_errors_as_failures():
        require_detector(dataset)
        table = storage.work_dir(project.name, dataset.asset_name, "aspect_buckets") / "faces.parquet"
        on_progress = log_progress(context, "images searched for faces")
        return find_faces(storage.data_dir(dataset), kept, table, on_progress)
