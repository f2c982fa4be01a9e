"""Masks: every file of a dataset of masks, and which image each belongs to. No latent depends on them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key, version
from assets.checks.data_checks import files_accounted_for
from assets.checks.result_checks import result, specs
from assets.dataset import DatasetRunConfig, scan_files, source_of
from assets.errors import user_errors_as_failures
from assets.metadata import NAMES_SHOWN, dropped_table, inline_image
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset, MaskKind
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.data.decoding.image_decoding import UnreadableImage
from sdxl_pipeline.data.masks.mask_pairs import MaskPairs, overlaid, pair_masks
from sdxl_pipeline.data.quality.contact_sheets import contact_sheet
from sdxl_pipeline.data.scan.dataset_fingerprint import METADATA_ENTRY, dataset_fingerprint
from sdxl_pipeline.data.scan.table_digests import dataset_digest
from sdxl_pipeline.files.digest import digest_json

CODE = "2"
SOURCE = keys_used_by(ImageDataset, "masks")
SAMPLES = 12


def build_mask_dataset(project: Project, entry: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<masks>/dataset`."""
    key = dataset_key(project, entry, "dataset")

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        code_version=version(CODE, entry.model_dump(mode="json", include=SOURCE)),
        check_specs=specs(
            key,
            usable_masks="At least one mask can be read.",
            files_accounted_for="Files found = kept + dropped, each once, and every dropped one has a reason.",
        ),
        description=f"Every file of {source_of(entry)}: a mask, or dropped with a reason.",
    )
    def mask_dataset(
        context: dg.AssetExecutionContext, storage: Storage, config: DatasetRunConfig
    ) -> Iterator[Any]:
        with user_errors_as_failures():
            fingerprint = dataset_fingerprint(entry)  # before the scan, as that of images
            scanned, told, _ = scan_files(context, storage, project, entry, config.verify or entry.verify)
        kept = scanned[scanned["status"] == "kept"]
        context.log.info(f"{len(scanned)} files found, {len(kept)} masks.")
        yield dg.MaterializeResult(
            value=scanned,
            # names count, since they say which image a mask belongs to
            data_version=dg.DataVersion(
                digest_json([dataset_digest(scanned), sorted(kept["path"] + "/" + kept["key"])])
            ),
            metadata={
                "found": len(scanned),
                "kept": len(kept),
                "bytes": int(kept["size"].sum()),
                "dropped": dropped_table(scanned[scanned["status"] == "dropped"]),
                METADATA_ENTRY: fingerprint,
                **told,
            },
            check_results=[
                result("usable_masks", len(kept) > 0, f"{len(kept)} of {len(scanned)} files are masks."),
                files_accounted_for(scanned, kept),
            ],
        )

    return mask_dataset


def build_masks(project: Project, dataset: ImageDataset, entry: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/masks`: the masks of `entry` as those of the images of `dataset`."""
    key = dataset_key(project, dataset, "masks")
    kind = kind_of(entry)

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"pandas"},
        ins={
            "scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame),
            "found": dg.AssetIn(key=dataset_key(project, entry, "dataset"), dagster_type=pd.DataFrame),
        },
        code_version=version(CODE, [kind, dataset.missing_masks]),
        check_specs=specs(
            key,
            masks_paired="Every image has a mask of its own shape, unless missing_masks lets it be trained whole.",
            may_lack_an_image="Every mask belongs to an image that is trained.",
        ),
        description=f"Which image of {dataset.id} is masked by which file of {entry.id}: white is learned, black is ignored.",
    )
    def masks(
        context: dg.AssetExecutionContext, storage: Storage, scanned: pd.DataFrame, found: pd.DataFrame
    ) -> Iterator[Any]:
        paired = pair_masks(scanned, found)
        context.log.info(
            f"{len(paired.pairs)} images with a mask, {len(paired.without)} without, {len(paired.unused)} files that are no image's mask."
        )
        shown = _overlays(paired.pairs, storage.data_dir(dataset), storage.data_dir(entry), kind)
        yield dg.MaterializeResult(
            value=paired.pairs,
            data_version=dg.DataVersion(digest_json([kind, paired.digest()])),
            metadata={
                "masked": len(paired.pairs),
                "without_mask": dropped_table(paired.without),
                "unused": dropped_table(paired.unused),
                **shown,
            },
            check_results=[_paired(paired, dataset), _used(paired)],
        )

    return masks


def kind_of(entry: ImageDataset) -> MaskKind:
    """How the masks of an entry are read; the settings have it for every one."""
    if entry.conditioning_type is None:
        raise AssertionError(f"{entry.id} has no conditioning_type")
    return entry.conditioning_type


def _paired(paired: MaskPairs, dataset: ImageDataset) -> dg.AssetCheckResult:
    refuses = dataset.missing_masks == "refuse"
    faulty = paired.without if refuses else paired.refused
    told = [f"{path}: {reason}" for path, reason in zip(faulty["path"], faulty["reason"], strict=True)]
    hint = (
        " Add the masks (all white to learn everything)"
        + (', or write "missing_masks": "unmasked" to train images that have none whole.' if refuses else ".")
        if told
        else ""
    )
    return result(
        "masks_paired",
        not told,
        f"{len(paired.pairs)} images have a mask, {len(paired.without)} have none{_named(told)}.{hint}",
    )


def _used(paired: MaskPairs) -> dg.AssetCheckResult:
    told = [
        f"{path}: {reason}"
        for path, reason in zip(paired.unused["path"], paired.unused["reason"], strict=True)
    ]
    return result("may_lack_an_image", not told, f"{len(told)} files are no image's mask{_named(told)}.")


def _named(told: list[str]) -> str:
    more = f", and {len(told) - NAMES_SHOWN} more" if len(told) > NAMES_SHOWN else ""
    return f" ({'; '.join(told[:NAMES_SHOWN])}{more})" if told else ""


def _overlays(pairs: pd.DataFrame, images: Path, masks: Path, kind: MaskKind) -> dict[str, Any]:
    """Some of the images with what is ignored in red."""
    shown, names = [], []
    for row in pairs.iloc[:: max(1, len(pairs) // SAMPLES)].head(SAMPLES).itertuples():
        try:
            shown.append(overlaid(images / str(row.path), masks / str(row.mask_path), kind))
        except UnreadableImage:  # changed since the scan: the training says so, with its name
            continue
        names.append(str(row.path))
    if not shown:
        return {}
    return {"sample": inline_image(contact_sheet(shown, names), "images, what their masks ignore in red")}
