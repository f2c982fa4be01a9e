"""A dataset: downloaded if necessary, and every file with its digest, size, captions, and the reason if it was dropped."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import dagster as dg
import pandas as pd
from pydantic import Field

from assets.asset_keys import asset_attributes, dataset_key, project_key, version
from assets.checks import data_checks
from assets.event_log import log_progress, user_errors_as_failures
from assets.generated_images import generates_images
from assets.metadata import caption_filter_metadata, dataset_metadata, download_metadata, names_list
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.captions.caption_filters import filter_digest, load_caption_filter
from sdxl_pipeline.data.captions.caption_rules import complete_caption_settings
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, dataset_digest, dataset_fingerprint
from sdxl_pipeline.data.scan.dataset_scan import load_recorded_dataset, scan_dataset
from sdxl_pipeline.data.sources import FetchResult, fetch_source

CODE = "3"
SETTINGS = keys_used_by(ImageDataset, "dataset")
TRUSTED_STAGES = {"metadata", "aspect"}
"""Values of skip_file_discovery with which the files of the last scan are used without listing them again."""


class DatasetRunConfig(dg.Config):
    """Options of one run."""

    verify: bool = Field(
        default=False,
        description="Read and hash every file again, also those whose size, time and inode are unchanged.",
    )


def build_dataset(project: Project, entry: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_dataset`."""
    key = dataset_key(project, entry, "dataset")
    dataset = complete_caption_settings(entry, project.text_embeds_of(entry), project.training.seed)
    settings = dataset.model_dump(mode="json", include=SETTINGS)

    @dg.asset(
        key=key,
        deps=[project_key(project, "generated_images")] if generates_images(project) else [],
        **asset_attributes(project, "data", "pandas", "parquet", dataset=dataset),
        code_version=version(CODE, [settings, filter_digest(dataset.caption_filter_list)]),
        check_specs=[check.spec(key) for check in data_checks.DATASET_CHECKS],
        description=f"Every file of {describe_source(dataset)}: kept, or dropped with a reason.",
    )
    def dataset_asset(
        context: dg.AssetExecutionContext, storage: Storage, config: DatasetRunConfig
    ) -> Iterator[dg.MaterializeResult[pd.DataFrame]]:
        with user_errors_as_failures():
            # Computed before the scan, so that the sensor detects a file that changes during it.
            fingerprint = dataset_fingerprint(dataset)
            scan = scan_files(context, storage, project, dataset, config.verify or dataset.verify)
            filter_metadata = _report_caption_filter(context, dataset)
        scanned, folder = scan.table, storage.data_dir(dataset)
        kept = scanned[scanned["status"] == "kept"]
        context.log.info(f"{len(scanned)} files found, {len(kept)} kept, {len(scanned) - len(kept)} dropped.")
        scanned.attrs[METADATA_ENTRY] = fingerprint
        yield dg.MaterializeResult(
            value=scanned,
            data_version=dg.DataVersion(dataset_digest(scanned)),
            metadata=dataset_metadata(scanned, folder)
            | scan.metadata
            | filter_metadata
            | {METADATA_ENTRY: fingerprint},
            check_results=data_checks.check_dataset(scanned, dataset, folder, scan.notes),
        )

    return dataset_asset


class ScannedFiles(NamedTuple):
    """Every file of a dataset with its status, metadata about the scan, and notes on unused data and settings."""

    table: pd.DataFrame
    metadata: dict[str, Any]
    notes: list[str]


def scan_files(
    context: dg.AssetExecutionContext, storage: Storage, project: Project, dataset: ImageDataset, verify: bool
) -> ScannedFiles:
    """List the files of a dataset, after downloading them if necessary; read the new and changed ones, or all with `verify`."""
    work_dir = storage.work_dir(project.name, dataset.asset_name, "dataset")
    recorded = work_dir / "scan.parquet"
    folder = storage.data_dir(dataset)
    scanned: pd.DataFrame | None = None
    metadata: dict[str, Any] = {}
    notes = list(project.unused_settings.get(dataset.id, ()))
    if dataset.skipped_stages & TRUSTED_STAGES and not verify:
        scanned = load_recorded_dataset(dataset, folder, recorded, notes.append)
        if scanned is not None:
            metadata["discovery"] = (
                "skipped: the files are those recorded by the last scan (skip_file_discovery)"
            )
            context.log.info(
                f"skip_file_discovery: files are not listed; {len(scanned)} are recorded by the last scan."
            )
        else:
            context.log.info("skip_file_discovery: no scan is recorded yet, so the files are listed.")
    if scanned is None:
        fetched = fetch_source(dataset, storage.path / "sources", log_progress(context, "files downloaded"))
        metadata = _report_downloads(context, dataset, fetched)
        notes += fetched.notes
        folder = fetched.folder
        scanned = scan_dataset(
            dataset,
            folder,
            captions=fetched.captions,
            failed=fetched.failed,
            recorded=recorded,
            verify=verify,
            on_progress=log_progress(context, "new or changed files read"),
            on_note=notes.append,
        )
    if dataset.find_near_duplicates:
        on_progress = log_progress(context, "perceptual hashes of new images computed")
        scanned = compute_hashes(folder, scanned, work_dir / "looks.parquet", on_progress)
    for note in notes:
        context.log.warning(note)
    if notes:
        metadata["unused_data"] = names_list(notes)
    return ScannedFiles(scanned, metadata, notes)


def describe_source(dataset: ImageDataset) -> str:
    """Return where a dataset's files come from, as Markdown."""
    match dataset.type:
        case "local":
            return f"`{dataset.instance_data_dir}`"
        case "huggingface":
            return f"`{dataset.dataset_name}` on the Hugging Face Hub"
        case "csv":
            return f"the list `{dataset.csv_file}`"
        case _:
            return f"`{dataset.url}`" if dataset.url else f"the bucket `{dataset.aws_bucket_name}`"


def _report_downloads(
    context: dg.AssetExecutionContext, dataset: ImageDataset, fetched: FetchResult
) -> dict[str, Any]:
    """Log the downloads of a remote dataset and return their metadata."""
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
    return download_metadata(fetched, describe_source(dataset))


def _report_caption_filter(context: dg.AssetExecutionContext, dataset: ImageDataset) -> dict[str, Any]:
    """Log the lines of a caption filter that are not regular expressions, and return the filter's metadata."""
    caption_filter = load_caption_filter(dataset)
    if caption_filter is None:
        return {}
    if caption_filter.literal_lines:
        context.log.warning(
            f"{caption_filter.where}: these lines are not valid regular expressions and are used as literal text: "
            + ", ".join(map(repr, caption_filter.literal_lines))
        )
    return caption_filter_metadata(caption_filter)
