"""A dataset: fetched if need be, and every file of it with its digest, size, captions, and why it was left out if it was."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import dagster as dg
import pandas as pd
from pydantic import Field

from assets.asset_keys import dataset_key, version
from assets.checks import data_checks
from assets.errors import user_errors_as_failures
from assets.metadata import dropped_table, inline_image, names_list
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.captions.caption_filters import caption_filter_of, filter_digest
from sdxl_pipeline.data.captions.caption_rules import complete_caption_settings
from sdxl_pipeline.data.quality.contact_sheets import (
    caption_length_histogram,
    contact_sheet,
    resolution_scatter,
)
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, dataset_fingerprint
from sdxl_pipeline.data.scan.dataset_scan import recall_dataset, scan_dataset
from sdxl_pipeline.data.scan.table_digests import dataset_digest
from sdxl_pipeline.data.sources import Fetched, fetch_source
from sdxl_pipeline.demo.demo_dataset import generate_if_asked

CODE = "3"
SETTINGS = keys_used_by(ImageDataset, "dataset")
TRUSTING = {"metadata", "aspect"}
"""Stages of skip_file_discovery with which the recorded files are taken at their word."""
SAMPLES = 12
PROGRESS_SECONDS = 10.0


class DatasetRunConfig(dg.Config):
    """What can be asked of one run."""

    verify: bool = Field(
        default=False,
        description="Read and hash every file again, also those whose size, time and inode are unchanged.",
    )


def build_dataset(project: Project, entry: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/dataset`."""
    key = dataset_key(project, entry, "dataset")
    dataset = complete_caption_settings(entry, project.text_embeds_of(entry), project.training.seed)
    settings = dataset.model_dump(mode="json", include=SETTINGS)

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        code_version=version(CODE, [settings, filter_digest(dataset.caption_filter_list)]),
        check_specs=data_checks.dataset_specs(key),
        description=f"Every file of {source_of(dataset)}: kept, or dropped with a reason.",
    )
    def dataset_asset(
        context: dg.AssetExecutionContext, storage: Storage, config: DatasetRunConfig
    ) -> Iterator[Any]:
        with user_errors_as_failures():
            generate_if_asked(project.folder)
            # Taken before the scan: a file that changes meanwhile is then seen as changed by the sensor.
            fingerprint = dataset_fingerprint(dataset)
            scanned, told, notes = scan_files(
                context, storage, project, dataset, config.verify or dataset.verify
            )
            told |= _filter_notes(context, dataset)
        kept = scanned[scanned["status"] == "kept"]
        context.log.info(f"{len(scanned)} files found, {len(kept)} kept, {len(scanned) - len(kept)} dropped.")
        yield dg.MaterializeResult(
            value=scanned,
            data_version=dg.DataVersion(dataset_digest(scanned)),
            metadata=_metadata(storage, dataset, scanned) | told | {METADATA_ENTRY: fingerprint},
            check_results=data_checks.check_dataset(scanned, dataset, storage.data_dir(dataset), notes),
        )

    return dataset_asset


def scan_files(
    context: dg.AssetExecutionContext, storage: Storage, project: Project, dataset: ImageDataset, verify: bool
) -> tuple[pd.DataFrame, dict[str, Any], list[str]]:
    """Return every file of a dataset, fetched and read as far as needed; metadata; and what of its data or settings is not used."""
    work_dir = storage.work_dir(project.name, dataset.asset_name, "dataset")
    recorded = work_dir / "scan.parquet"
    folder = storage.data_dir(dataset)
    scanned, told = None, dict[str, Any]()
    notes = list(project.unused_settings.get(dataset.id, ()))
    if dataset.skipped_stages & TRUSTING and not verify:
        scanned = recall_dataset(dataset, folder, recorded, notes.append)
        if scanned is not None:
            told["discovery"] = "skipped: the files are those recorded by the last scan (skip_file_discovery)"
            context.log.info(
                f"Files are not looked at, as skip_file_discovery says: {len(scanned)} are recorded."
            )
        else:
            context.log.info("skip_file_discovery: nothing is recorded yet, so the files are looked at.")
    if scanned is None:
        fetched = fetch_source(dataset, storage.path / "sources", _progress(context, "files fetched"))
        told = _fetch_notes(context, dataset, fetched)
        notes += fetched.notes
        folder = fetched.folder
        scanned = scan_dataset(
            dataset,
            folder,
            captions=fetched.captions,
            failed=fetched.failed,
            recorded=recorded,
            verify=verify,
            on_progress=_progress(context, "new or changed files read"),
            on_note=notes.append,
        )
    if dataset.find_near_duplicates:
        looked = _progress(context, "new images looked at")
        scanned = compute_hashes(folder, scanned, work_dir / "looks.parquet", looked)
    for note in notes:
        context.log.warning(note)
    if notes:
        told["not_used"] = names_list(notes)
    return scanned, told, notes


def _progress(context: dg.AssetExecutionContext, what: str) -> Callable[[int, int], None]:
    """A line in the log every ten seconds."""
    told = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            context.log.info(f"{done} of {total} {what}.")

    return on_progress


def source_of(dataset: ImageDataset) -> str:
    """Where a dataset's files come from, in words."""
    match dataset.type:
        case "local":
            return f"`{dataset.instance_data_dir}`"
        case "huggingface":
            return f"`{dataset.dataset_name}` on the Hugging Face Hub"
        case "csv":
            return f"the list `{dataset.csv_file}`"
        case _:
            return f"`{dataset.url}`" if dataset.url else f"the bucket `{dataset.aws_bucket_name}`"


def _fetch_notes(
    context: dg.AssetExecutionContext, dataset: ImageDataset, fetched: Fetched
) -> dict[str, Any]:
    if dataset.type == "local":
        return {}
    megabytes = fetched.downloaded_bytes / 1e6
    context.log.info(
        f"{fetched.downloaded} of {fetched.files} files downloaded, {megabytes:.1f} MB in {fetched.seconds:.1f} s; "
        f"{len(fetched.failed)} failed."
    )
    by_reason: dict[str, list[str]] = {}
    for name, reason in fetched.failed:
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        context.log.warning(
            f"{len(names)} not fetched, {reason}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        )
    notes = {
        "revision": fetched.revision,
        "fetched_from": source_of(dataset),
        "files_at_source": fetched.files,
        "downloaded": fetched.downloaded,
        "downloaded_bytes": fetched.downloaded_bytes,
        "download_mb_per_second": megabytes / fetched.seconds
        if fetched.downloaded and fetched.seconds
        else None,
        "failed_downloads": len(fetched.failed),
    }
    return {name: value for name, value in notes.items() if value is not None}


def _filter_notes(context: dg.AssetExecutionContext, dataset: ImageDataset) -> dict[str, Any]:
    found = caption_filter_of(dataset)
    if found is None:
        return {}
    notes: dict[str, Any] = {"caption_filter_lines": len(found.rules)}
    if found.taken_literally:
        context.log.warning(
            f"{found.where}: these lines are no regular expressions, and are taken as literal text: "
            + ", ".join(map(repr, found.taken_literally))
        )
        notes["filter_lines_taken_literally"] = names_list(f"`{line}`" for line in found.taken_literally)
    return notes


def _metadata(storage: Storage, dataset: ImageDataset, scanned: pd.DataFrame) -> dict[str, Any]:
    kept = scanned[scanned["status"] == "kept"]
    captionless = kept[kept["caption_status"] != "ok"]
    metadata: dict[str, Any] = {
        "found": len(scanned),
        "kept": len(kept),
        "captions": int(kept["captions"].map(len).sum()),
        "bytes": int(kept["size"].sum()),
        "dropped": dropped_table(scanned[scanned["status"] == "dropped"]),
    }
    if len(captionless):  # those that were dropped for it are among the dropped
        metadata["trained_without_caption"] = dropped_table(
            captionless[["path"]].assign(reason="caption " + captionless["caption_status"])
        )
    if kept.empty:
        return metadata
    sample = kept.iloc[:: max(1, len(kept) // SAMPLES)].head(SAMPLES)
    paths = [storage.data_dir(dataset) / path for path in sample["path"]]
    captions = [next(iter(texts), "") for texts in sample["captions"]]
    return metadata | {
        "sample": inline_image(contact_sheet(paths, captions), "some of the images with their captions"),
        "resolutions": inline_image(resolution_scatter(kept), "width and height of the images"),
        "caption_lengths": inline_image(caption_length_histogram(kept), "caption lengths"),
    }
