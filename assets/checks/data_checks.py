"""Checks of datasets and crop plans: consistent counts, captions, near-duplicates, and leakage between splits."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key
from assets.checks.check import Check
from assets.metadata import MAX_NAMES, inline_image
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.optimization import BucketFill
from sdxl_pipeline.data.buckets.crop_plan import images_per_bucket
from sdxl_pipeline.data.buckets.holdout import MINIMA
from sdxl_pipeline.data.quality.contact_sheets import grouped_sheet
from sdxl_pipeline.data.quality.near_duplicates import find_leaks, find_near_duplicates

MISSING_CAPTIONS_LIMIT = 0.2
"""Largest accepted share of images without a caption; a larger one points to a wrong setting rather than to a few missing files."""
SHARED_CAPTION_LIMIT = 5
"""Smallest number of different images that share a caption for which it is reported."""
GROUPS_SHOWN = 8
_EXAMPLES = 5
_NO_LEAKAGE = "No image that the eval loss is measured on, nor a near-duplicate of it, is trained on."

USABLE_IMAGES = Check("usable_images", "At least one image can be trained on.", blocking=True)
CAPTIONS_PRESENT = Check(
    "captions_present",
    f"At most {MISSING_CAPTIONS_LIMIT:.0%} of the images lack a caption.",
    blocking=True,
)
FILE_COUNTS_CONSISTENT = Check(
    "file_counts_consistent",
    "Files found = kept + dropped, each listed once, and every dropped one has a reason.",
    blocking=True,
)
NO_NEAR_DUPLICATES = Check(
    "no_near_duplicates", "No image has a byte-identical copy or a near-duplicate.", blocking=False
)
NO_UNUSED_DATA = Check(
    "no_unused_data",
    "Every setting has an effect, every caption file is read, every row of a table belongs to an image.",
    blocking=False,
)
NO_SHARED_CAPTIONS = Check(
    "no_shared_captions",
    f"No caption is shared by {SHARED_CAPTION_LIMIT} different images or more.",
    blocking=False,
)
DATASET_CHECKS = (
    USABLE_IMAGES,
    CAPTIONS_PRESENT,
    FILE_COUNTS_CONSISTENT,
    NO_NEAR_DUPLICATES,
    NO_UNUSED_DATA,
    NO_SHARED_CAPTIONS,
)

CROPS_PLANNED = Check(
    "crops_planned", "At least one image passes the size and aspect filters.", blocking=True
)
IMAGE_COUNTS_CONSISTENT = Check(
    "image_counts_consistent",
    "Images kept by the dataset = images planned + images filtered out.",
    blocking=True,
)
BUCKETS_FILL_A_BATCH = Check(
    "buckets_fill_a_batch", "Every bucket has a full batch of different images.", blocking=False
)
NO_EVAL_LEAKAGE = Check("no_eval_leakage", _NO_LEAKAGE, blocking=False)
BUCKET_CHECKS = (CROPS_PLANNED, IMAGE_COUNTS_CONSISTENT, BUCKETS_FILL_A_BATCH)
"""Checks of every crop plan; NO_EVAL_LEAKAGE is added where a share of the images is held out."""


def check_dataset(
    scanned: pd.DataFrame, dataset: ImageDataset, folder: Path, notes: Sequence[str] = ()
) -> list[dg.AssetCheckResult]:
    """Return the results of `DATASET_CHECKS`; `folder` contains the images, `notes` describe unused data and settings."""
    kept = scanned[scanned["status"] == "kept"]
    return [
        USABLE_IMAGES.result(len(kept) > 0, f"{len(kept)} of {len(scanned)} files are kept."),
        _captions_present(scanned, kept, dataset),
        check_file_counts(scanned, kept),
        _near_duplicates(kept, dataset, folder),
        NO_UNUSED_DATA.result(not notes, " ".join(notes) or "All data and settings are used."),
        _shared_captions(kept, dataset),
    ]


def check_buckets(
    rows: pd.DataFrame,
    dropped: pd.DataFrame,
    kept: pd.DataFrame,
    batch_size: int,
    fill: BucketFill = "partial",
) -> list[dg.AssetCheckResult]:
    """Return the results of `BUCKET_CHECKS`; `kept` are the rows of the dataset with status "kept"."""
    counts = images_per_bucket(rows)
    short = [
        f"{width}x{height} ({count})"
        for (height, width), count in zip(counts.index, counts.tolist(), strict=True)
        if count < batch_size
    ]
    planned = rows["path"].nunique()
    by_reason = _reason_counts(dropped["reason"])
    consequence = {
        "partial": "An optimizer step on such a batch has fewer images, so each of them has a larger effect on the weights; "
        "raise gradient_accumulation_steps or use fewer buckets (crop_aspect) to reduce this.",
        "wrap": "bucket_fill is wrap, so their images are repeated within an epoch.",
    }
    return [
        CROPS_PLANNED.result(len(rows) > 0, f"{len(rows)} crops of {len(kept)} images."),
        IMAGE_COUNTS_CONSISTENT.result(
            planned + len(dropped) == len(kept),
            f"{len(kept)} images = {planned} planned + {len(dropped)} filtered out{by_reason}.",
        ),
        BUCKETS_FILL_A_BATCH.result(
            not short,
            f"Buckets with fewer images than a batch of {batch_size}: {', '.join(short) or 'none'}."
            + (f" {consequence[fill]}" if short else ""),
        ),
    ]


def check_held_out(rows: pd.DataFrame, kept: pd.DataFrame, folder: Path) -> dg.AssetCheckResult:
    """Return the result of `NO_EVAL_LEAKAGE` between the held-out and the training images of one dataset."""
    split = kept["path"].map(dict(zip(rows["path"], rows["split"], strict=True)))
    return _leakage(NO_EVAL_LEAKAGE, folder, kept[split == "train"], folder, kept[split == "eval"])


def build_leak_checks(project: Project) -> list[dg.AssetChecksDefinition]:
    """Return for each eval dataset a check `no_eval_leakage_from_<dataset>` against each training dataset.

    They are separate check definitions, so that the eval dataset's asset does not depend on the training datasets.
    """
    trained = [dataset for dataset in project.datasets if dataset.dataset_type != "eval"]
    return [
        _build_leak_check(project, dataset, other) for dataset in project.eval_datasets for other in trained
    ]


def build_regularisation_checks(project: Project) -> list[dg.AssetChecksDefinition]:
    """Return for each regularisation dataset a check `no_overlap_with_<dataset>` against each ordinary training dataset.

    An image in both has two conflicting targets: the ordinary one, and the base model's prediction.
    """
    trained = [dataset for dataset in project.train_datasets if not dataset.is_regularisation_data]
    return [
        _build_regularisation_check(project, dataset, other)
        for dataset in project.train_datasets
        if dataset.is_regularisation_data
        for other in trained
    ]


def _build_regularisation_check(
    project: Project, dataset: ImageDataset, other: ImageDataset
) -> dg.AssetChecksDefinition:
    check = Check(
        f"no_overlap_with_{other.asset_name}",
        f"No regularisation image is also an ordinary training image of {other.id}.",
        blocking=False,
    )

    @dg.asset_check(
        asset=dataset_key(project, dataset, "dataset"),
        name=check.name,
        description=check.description,
        blocking=check.blocking,
        additional_ins={
            "trained": dg.AssetIn(key=dataset_key(project, other, "dataset"), dagster_type=pd.DataFrame)
        },
    )
    def regularisation_check(scanned: pd.DataFrame, trained: pd.DataFrame) -> dg.AssetCheckResult:
        kept, ordinary = (frame[frame["status"] == "kept"] for frame in (scanned, trained))
        names = dict(zip(ordinary["key"], ordinary["path"], strict=True))
        same = kept[kept["key"].isin(names)]
        overlap = [f"{path} = {names[key]}" for path, key in zip(same["path"], same["key"], strict=True)]
        hint = " Remove them from one of the two." if overlap else ""
        return check.result(
            not overlap,
            f"{len(overlap)} of {len(kept)} regularisation images are also ordinary training images of {other.id}"
            f"{_examples(overlap)}.{hint}",
        )

    return regularisation_check


def _build_leak_check(
    project: Project, dataset: ImageDataset, other: ImageDataset
) -> dg.AssetChecksDefinition:
    check = Check(f"no_eval_leakage_from_{other.asset_name}", _NO_LEAKAGE, blocking=False)

    @dg.asset_check(
        asset=dataset_key(project, dataset, "dataset"),
        name=check.name,
        description=check.description,
        blocking=check.blocking,
        additional_ins={
            "trained": dg.AssetIn(key=dataset_key(project, other, "dataset"), dagster_type=pd.DataFrame)
        },
    )
    def leak_check(storage: Storage, scanned: pd.DataFrame, trained: pd.DataFrame) -> dg.AssetCheckResult:
        train = trained[trained["status"] == "kept"]
        evaluation = scanned[scanned["status"] == "kept"]
        return _leakage(check, storage.data_dir(other), train, storage.data_dir(dataset), evaluation)

    return leak_check


def _captions_present(
    scanned: pd.DataFrame, kept: pd.DataFrame, dataset: ImageDataset
) -> dg.AssetCheckResult:
    # Only images have a caption status; other files have none.
    uncaptioned = scanned[~scanned["caption_status"].isin(["", "ok"])]
    captionable = len(kept) + int((uncaptioned["status"] == "dropped").sum())
    share = len(uncaptioned) / captionable if captionable else 0.0
    hint = ' Add the captions, or write "missing_captions": "empty" to train these images without text.'
    return CAPTIONS_PRESENT.result(
        dataset.missing_captions == "empty" or share <= MISSING_CAPTIONS_LIMIT,
        f"{len(uncaptioned)} of {captionable} images ({share:.0%}) have no usable caption."
        + (hint if share else ""),
    )


def check_file_counts(scanned: pd.DataFrame, kept: pd.DataFrame) -> dg.AssetCheckResult:
    """Return the result of `FILE_COUNTS_CONSISTENT`."""
    dropped = scanned[scanned["status"] == "dropped"]
    unexplained = int((dropped["reason"] == "").sum())
    duplicated = int(scanned["path"].duplicated().sum())
    unread = int(((kept["key"] == "") | (kept["width"] <= 0) | (kept["reason"] != "")).sum())
    counts = {"without a reason": unexplained, "listed twice": duplicated, "kept although never read": unread}
    errors = "".join(f" {count} {error}!" for error, count in counts.items() if count)
    return FILE_COUNTS_CONSISTENT.result(
        len(scanned) == len(kept) + len(dropped) and not errors,
        f"{len(scanned)} found = {len(kept)} kept + {len(dropped)} dropped{_reason_counts(dropped['reason'])}.{errors}",
    )


def _near_duplicates(kept: pd.DataFrame, dataset: ImageDataset, folder: Path) -> dg.AssetCheckResult:
    found = find_near_duplicates(kept)
    copies = sum(len(paths) - 1 for paths in found.same)
    similar = sum(len(group.paths) for group in found.near_duplicates)
    findings = [
        f"{copies} files are copies of others{_examples([' = '.join(paths[:3]) for paths in found.same])}"
    ]
    if dataset.find_near_duplicates:
        at_least = "" if found.complete else "at least "
        names = _examples([" ~ ".join(group.paths[:3]) for group in found.near_duplicates])
        findings.append(
            f"{at_least}{similar} images are near-duplicates, in {len(found.near_duplicates)} groups{names}"
        )
    else:
        findings.append("near-duplicates were not searched, since find_near_duplicates is off")
    if found.featureless:
        findings.append(f"{found.featureless} flat or evenly shaded images cannot be compared")
    hint = " All of them are trained on: remove the unintended ones." if copies or similar else ""
    groups = [group.paths for group in found.near_duplicates] + list(found.same)
    sheet = [[(folder / path, path) for path in paths] for paths in groups]
    return NO_NEAR_DUPLICATES.result(
        not groups,
        "; ".join(findings) + "." + hint,
        _sheet_metadata(sheet, "near-duplicates, one group per row"),
    )


def _shared_captions(kept: pd.DataFrame, dataset: ImageDataset) -> dg.AssetCheckResult:
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return NO_SHARED_CAPTIONS.result(True, "All images share the instance prompt, as configured.")
    captions = kept.drop_duplicates("key")["captions"].explode().dropna()
    captions = captions[captions.str.strip() != ""]  # trained without text on purpose
    # a caption that one image has several times counts once
    counts = captions.reset_index().drop_duplicates()["captions"].value_counts()
    shared = counts[counts >= SHARED_CAPTION_LIMIT]
    examples = [f"{str(caption)[:80]!r} ({count})" for caption, count in shared.head(_EXAMPLES).items()]
    more = f" and {len(shared) - _EXAMPLES} more" if len(shared) > _EXAMPLES else ""
    return NO_SHARED_CAPTIONS.result(
        shared.empty,
        f"{len(shared)} of {len(counts)} captions are shared by {SHARED_CAPTION_LIMIT} different images or more"
        + (
            f": {', '.join(examples)}{more}. The model cannot learn from these captions what distinguishes the images."
            if examples
            else "."
        ),
    )


def _leakage(
    check: Check, train_folder: Path, train: pd.DataFrame, folder: Path, evaluation: pd.DataFrame
) -> dg.AssetCheckResult:
    """Return the result of `check`: which of the images `evaluation` in `folder` are among those trained on."""
    if evaluation.empty:
        return check.result(
            False,
            f"There are no evaluation images to compare with the {len(train)} that are trained on. Images are held out of a dataset with "
            f"{MINIMA[-1][0]} images or more: add images, or an eval dataset.",
        )
    leaks, complete = find_leaks(train, evaluation)
    pairs = [f"{leak.eval_path} {'=' if leak.same else '~'} {leak.train_path}" for leak in leaks]
    sheet = [
        [
            (folder / leak.eval_path, f"eval: {leak.eval_path}"),
            (train_folder / leak.train_path, f"train: {leak.train_path}"),
        ]
        for leak in leaks
    ]
    unhashed = int((train["phash"] == "").sum() + (evaluation["phash"] == "").sum())
    return check.result(
        not leaks,
        f"{'' if complete else 'At least '}{len(leaks)} of {len(evaluation)} evaluation images are trained on, or are near-duplicates of "
        f"training images{_examples(pairs)}."
        + (
            f" {unhashed} were compared by their bytes alone: find_near_duplicates is off."
            if unhashed
            else ""
        )
        + (" The eval loss is biased low: remove them from one of the two." if leaks else ""),
        _sheet_metadata(sheet, "evaluation images beside training images"),
    )


def _reason_counts(reasons: "pd.Series[str]") -> str:
    """Return the number of files per reason in parentheses, the most frequent first; empty without reasons."""
    counts = Counter(reasons.tolist()).most_common()
    parts = [f"{count} {reason}" for reason, count in counts[:MAX_NAMES]]
    if len(counts) > MAX_NAMES:
        parts.append(f"{sum(count for _, count in counts[MAX_NAMES:])} for other reasons")
    return f" ({', '.join(parts)})" if parts else ""


def _examples(names: Sequence[str]) -> str:
    more = f", and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
    return f" ({', '.join(names[:_EXAMPLES])}{more})" if names else ""


def _sheet_metadata(groups: Sequence[Sequence[tuple[Path, str]]], alt: str) -> dict[str, dg.MetadataValue]:
    if not groups:
        return {}
    return {"images": inline_image(grouped_sheet(groups[:GROUPS_SHOWN]), alt)}
