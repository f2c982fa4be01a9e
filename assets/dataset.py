"""A dataset: every file found, with its digest, size, captions, and why it was left out if it was."""

import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from assets import checks
from assets.failures import told_to_the_user
from assets.keys import lane_key, version
from assets.show import dropped_table, picture
from sdxl_pipeline.images.digests import dataset_digest
from sdxl_pipeline.images.fingerprint import METADATA_ENTRY, folder_fingerprint
from sdxl_pipeline.images.pictures import caption_length_histogram, contact_sheet, resolution_scatter
from sdxl_pipeline.images.scan import scan_dataset
from sdxl_pipeline.project.datasets import ImageDataset
from sdxl_pipeline.project.project import Project
from sdxl_pipeline.sdxl.tiny.demo import generate_if_asked

CODE = "1"
SETTINGS = {
    "instance_data_dir",
    "caption_strategy",
    "instance_prompt",
    "prepend_instance_prompt",
    "only_instance_prompt",
    "missing_captions",
}
SAMPLES = 12
PROGRESS_SECONDS = 10.0


def build_dataset(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/dataset`."""
    key = lane_key(project, dataset, "dataset")

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        code_version=version(CODE, dataset.model_dump(mode="json", include=SETTINGS)),
        check_specs=checks.dataset_specs(key),
        description=f"Every file found in `{dataset.instance_data_dir}`: kept, or dropped with a reason.",
    )
    def dataset_asset(context: dg.AssetExecutionContext) -> Iterator[Any]:
        with told_to_the_user():
            scanned, fingerprint = _scan(context, project, dataset)
        kept = scanned[scanned["status"] == "kept"]
        context.log.info(f"{len(scanned)} files found, {len(kept)} kept, {len(scanned) - len(kept)} dropped.")
        yield dg.MaterializeResult(
            value=scanned,
            data_version=dg.DataVersion(dataset_digest(scanned)),
            metadata=_metadata(dataset, scanned) | {METADATA_ENTRY: fingerprint},
            check_results=checks.check_dataset(scanned, allows_missing=dataset.missing_captions == "empty"),
        )

    return dataset_asset


def _scan(
    context: dg.AssetExecutionContext, project: Project, dataset: ImageDataset
) -> tuple[pd.DataFrame, str]:
    """Every file found, and the state of the folder when the search began."""
    generate_if_asked(project.folder)
    # Taken before the scan: a file that changes meanwhile is then seen as changed by the sensor.
    fingerprint = folder_fingerprint(dataset.instance_data_dir)
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            context.log.info(f"{done} of {total} pictures read.")

    return scan_dataset(dataset, on_progress), fingerprint


def _metadata(dataset: ImageDataset, scanned: pd.DataFrame) -> dict[str, Any]:
    kept = scanned[scanned["status"] == "kept"]
    metadata: dict[str, Any] = {
        "found": len(scanned),
        "kept": len(kept),
        "captions": int(kept["captions"].map(len).sum()),
        "bytes": int(kept["size"].sum()),
        "dropped": dropped_table(scanned[scanned["status"] == "dropped"]),
    }
    if kept.empty:
        return metadata
    sample = kept.iloc[:: max(1, len(kept) // SAMPLES)].head(SAMPLES)
    paths = [dataset.instance_data_dir / path for path in sample["path"]]
    captions = [next(iter(texts), "") for texts in sample["captions"]]
    return metadata | {
        "sample": picture(contact_sheet(paths, captions), "some of the pictures with their captions"),
        "resolutions": picture(resolution_scatter(kept), "width and height of the pictures"),
        "caption_lengths": picture(caption_length_histogram(kept), "caption lengths"),
    }
