"""Masks: every file of a mask dataset, and the image that each belongs to. Latents do not depend on masks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, version
from assets.checks.check import Check
from assets.checks.data_checks import FILE_COUNTS_CONSISTENT, check_file_counts
from assets.dataset import DatasetRunConfig, describe_source, scan_files
from assets.event_log import user_errors_as_failures
from assets.metadata import MAX_NAMES, SAMPLES, dropped_table, inline_image, mask_dataset_metadata
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset, MaskKind
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.masks.mask_pairs import MaskPairs, mask_overlay, pair_masks, pairs_digest
from sdxl_pipeline.data.quality.contact_sheets import contact_sheet
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, dataset_digest, dataset_fingerprint
from sdxl_pipeline.files.digest import digest_json

CODE = "2"
SOURCE = keys_used_by(ImageDataset, "masks")

USABLE_MASKS = Check("usable_masks", "At least one mask can be read.", blocking=True)
MASKS_PAIRED = Check(
    "masks_paired",
    "Every image has a mask of its own aspect ratio, unless missing_masks allows unmasked images.",
    blocking=True,
)
NO_UNUSED_MASKS = Check("no_unused_masks", "Every mask belongs to an image that is trained.", blocking=False)


def build_mask_dataset(project: Project, entry: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<masks>_dataset`."""
    key = dataset_key(project, entry, "dataset")

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "pandas", "parquet", dataset=entry),
        code_version=version(CODE, entry.model_dump(mode="json", include=SOURCE)),
        check_specs=[check.spec(key) for check in (USABLE_MASKS, FILE_COUNTS_CONSISTENT)],
        description=f"Every file of {describe_source(entry)}: a mask, or dropped with a reason.",
    )
    def mask_dataset(
        context: dg.AssetExecutionContext, storage: Storage, config: DatasetRunConfig
    ) -> Iterator[dg.MaterializeResult[pd.DataFrame]]:
        with user_errors_as_failures():
            fingerprint = dataset_fingerprint(entry)  # before the scan, as for images
            scan = scan_files(context, storage, project, entry, config.verify or entry.verify)
        scanned = scan.table
        kept = scanned[scanned["status"] == "kept"]
        context.log.info(f"{len(scanned)} files found, {len(kept)} masks.")
        scanned.attrs[METADATA_ENTRY] = fingerprint
        yield dg.MaterializeResult(
            value=scanned,
            # includes the names, which pair masks with images
            data_version=dg.DataVersion(
                digest_json([dataset_digest(scanned), sorted(kept["path"] + "/" + kept["key"])])
            ),
            metadata=mask_dataset_metadata(scanned) | {METADATA_ENTRY: fingerprint} | scan.metadata,
            check_results=[
                USABLE_MASKS.result(len(kept) > 0, f"{len(kept)} of {len(scanned)} files are masks."),
                check_file_counts(scanned, kept),
            ],
        )

    return mask_dataset


def build_masks(project: Project, dataset: ImageDataset, entry: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_masks`: the masks of `entry` paired with the images of `dataset`."""
    key = dataset_key(project, dataset, "masks")
    kind = mask_kind(entry)

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "pandas", "parquet", dataset=dataset),
        ins={
            "scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame),
            "mask_files": dg.AssetIn(key=dataset_key(project, entry, "dataset"), dagster_type=pd.DataFrame),
        },
        code_version=version(CODE, [kind, dataset.missing_masks]),
        check_specs=[check.spec(key) for check in (MASKS_PAIRED, NO_UNUSED_MASKS)],
        description=f"The mask of each image of {dataset.id}, from {entry.id}: white is learned, black is ignored.",
    )
    def masks(
        context: dg.AssetExecutionContext, storage: Storage, scanned: pd.DataFrame, mask_files: pd.DataFrame
    ) -> Iterator[dg.MaterializeResult[pd.DataFrame]]:
        paired = pair_masks(scanned, mask_files)
        context.log.info(
            f"{len(paired.pairs)} images with a mask, {len(paired.unmasked)} without, {len(paired.unused)} unused mask files."
        )
        overlays = _overlays(paired.pairs, storage.data_dir(dataset), storage.data_dir(entry), kind)
        yield dg.MaterializeResult(
            value=paired.pairs,
            data_version=dg.DataVersion(masks_digest(kind, paired.pairs)),
            metadata={
                "masked": len(paired.pairs),
                "without_mask": dropped_table(paired.unmasked),
                "unused": dropped_table(paired.unused),
                **overlays,
            },
            check_results=[_check_pairs(paired, dataset), _check_unused(paired)],
        )

    return masks


def mask_kind(entry: ImageDataset) -> MaskKind:
    """Return how the masks of a conditioning dataset are read. Validated settings always have it."""
    if entry.conditioning_type is None:
        raise AssertionError(f"{entry.id} has no conditioning_type")
    return entry.conditioning_type


def masks_digest(kind: MaskKind, pairs: pd.DataFrame) -> str:
    """Return a digest of the contents of images and masks that are paired, whatever their names and order, and of how masks are read."""
    return digest_json([kind, pairs_digest(pairs)])


def _check_pairs(paired: MaskPairs, dataset: ImageDataset) -> dg.AssetCheckResult:
    masks_required = dataset.missing_masks == "refuse"
    unpaired = paired.unmasked if masks_required else paired.rejected
    failures = _with_reasons(unpaired)
    hint = (
        " Add the masks (all white to learn everything)"
        + (
            ', or write "missing_masks": "unmasked" to train images without a mask unmasked.'
            if masks_required
            else "."
        )
        if failures
        else ""
    )
    return MASKS_PAIRED.result(
        not failures,
        f"{len(paired.pairs)} images have a mask, {len(paired.unmasked)} have none{_listed(failures)}.{hint}",
    )


def _check_unused(paired: MaskPairs) -> dg.AssetCheckResult:
    unused = _with_reasons(paired.unused)
    return NO_UNUSED_MASKS.result(
        not unused, f"{len(unused)} files are not the mask of any image{_listed(unused)}."
    )


def _with_reasons(files: pd.DataFrame) -> list[str]:
    return [f"{path}: {reason}" for path, reason in zip(files["path"], files["reason"], strict=True)]


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - MAX_NAMES} more" if len(items) > MAX_NAMES else ""
    return f" ({'; '.join(items[:MAX_NAMES])}{more})" if items else ""


def _overlays(pairs: pd.DataFrame, images: Path, masks: Path, kind: MaskKind) -> dict[str, Any]:
    """Return a contact sheet of some of the images, with their ignored pixels in red."""
    overlays, names = [], []
    for row in pairs.iloc[:: max(1, len(pairs) // SAMPLES)].head(SAMPLES).itertuples():
        try:
            overlays.append(mask_overlay(images / str(row.path), masks / str(row.mask_path), kind))
        except UnreadableImage:  # changed since the scan: the training reports it with the file's name
            continue
        names.append(str(row.path))
    if not overlays:
        return {}
    return {"sample": inline_image(contact_sheet(overlays, names), "images with their ignored pixels in red")}
