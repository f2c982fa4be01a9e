"""Checks of datasets and crop plans: every file accounted for, and nothing trained on twice or measured on unawares."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pandas as pd

from assets.asset_keys import dataset_key
from assets.checks.result_checks import result, specs
from assets.metadata import NAMES_SHOWN, inline_image
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.optimization import BucketFill
from sdxl_pipeline.data.buckets.crop_plan import images_per_bucket
from sdxl_pipeline.data.buckets.holdout import MINIMA
from sdxl_pipeline.data.quality.contact_sheets import grouped_sheet
from sdxl_pipeline.data.quality.near_duplicates import find_leaks, find_near_duplicates

MISSING_CAPTIONS_LIMIT = 0.2
"""Share of images without a caption from which a dataset is taken for a mistake rather than for a gap."""
SHARED_CAPTION_LIMIT = 5
"""Number of different images from which on a caption that they share is told."""
GROUPS_SHOWN = 8
_NAMED = 5
_LEAK = "may_leak_into_eval"
_LEAK_DESCRIPTION = "No image that the eval loss is measured on is trained on, nor one that looks like it."


def dataset_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a scanned dataset."""
    return specs(
        key,
        usable_images="At least one image can be trained on.",
        captions_present=f"At most {MISSING_CAPTIONS_LIMIT:.0%} of the images lack a caption.",
        files_accounted_for="Files found = kept + dropped, each once, and every dropped one has a reason.",
        may_look_alike="No image is there twice, be it byte for byte or nearly so to the eye.",
        may_leave_data_unused="Every setting has an effect, every caption file is read, every row of a table belongs to an image.",
        may_share_captions=f"No caption is shared by {SHARED_CAPTION_LIMIT} different images or more.",
    )


def check_dataset(
    scanned: pd.DataFrame, dataset: ImageDataset, folder: Path, notes: Sequence[str] = ()
) -> list[dg.AssetCheckResult]:
    """Return the results of `dataset_specs`; `folder` has the images, `notes` describe what of data and settings is not used."""
    kept = scanned[scanned["status"] == "kept"]
    return [
        result("usable_images", len(kept) > 0, f"{len(kept)} of {len(scanned)} files are kept."),
        _captions_present(scanned, kept, dataset),
        files_accounted_for(scanned, kept),
        _near_duplicates(kept, dataset, folder),
        result("may_leave_data_unused", not notes, " ".join(notes) or "All of it is used."),
        _shared_captions(kept, dataset),
    ]


def bucket_specs(key: dg.AssetKey, held_out: bool) -> list[dg.AssetCheckSpec]:
    """Checks of a crop plan; `held_out`: a share of its images is kept back for the eval loss."""
    leaks = {_LEAK: _LEAK_DESCRIPTION} if held_out else {}
    return specs(
        key,
        crops_planned="At least one image passes the size and aspect filters.",
        images_accounted_for="Images kept by the dataset = images planned + images filtered out.",
        may_fill_a_batch="Every bucket holds a full batch of different images.",
        **leaks,
    )


def check_buckets(
    rows: pd.DataFrame,
    dropped: pd.DataFrame,
    kept: pd.DataFrame,
    batch_size: int,
    fill: BucketFill = "partial",
) -> list[dg.AssetCheckResult]:
    """Results of `bucket_specs`, without the one about leaks; `kept` is what the dataset kept."""
    counts = images_per_bucket(rows)
    short = [
        f"{width}x{height} ({count})"
        for (height, width), count in zip(counts.index, counts.tolist(), strict=True)
        if count < batch_size
    ]
    planned = rows["path"].nunique()
    by_reason = _counted(dropped["reason"])
    consequence = {
        "partial": "An optimizer step made of such a batch has fewer images, each of which moves the weights more; "
        "gradient_accumulation_steps or fewer buckets (crop_aspect) even it out.",
        "wrap": "bucket_fill is wrap, so their images are repeated within an epoch.",
    }
    return [
        result("crops_planned", len(rows) > 0, f"{len(rows)} crops of {len(kept)} images."),
        result(
            "images_accounted_for",
            planned + len(dropped) == len(kept),
            f"{len(kept)} images = {planned} planned + {len(dropped)} filtered out{by_reason}.",
        ),
        result(
            "may_fill_a_batch",
            not short,
            f"Buckets with fewer images than a batch of {batch_size}: {', '.join(short) or 'none'}."
            + (f" {consequence[fill]}" if short else ""),
        ),
    ]


def check_held_out(rows: pd.DataFrame, kept: pd.DataFrame, folder: Path) -> dg.AssetCheckResult:
    """Whether the share of a dataset that is held back for the eval loss looks like what is trained on."""
    split = kept["path"].map(dict(zip(rows["path"], rows["split"], strict=True)))
    return _leaks(_LEAK, folder, kept[split == "train"], folder, kept[split == "eval"])


def build_leak_checks(project: Project) -> list[dg.AssetChecksDefinition]:
    """For each eval dataset, a check `may_leak_from_<dataset>` against each dataset that is trained on.

    They stand on their own, so that no eval dataset depends on another one.
    """
    trained = [dataset for dataset in project.datasets if dataset.dataset_type != "eval"]
    return [
        _build_leak_check(project, dataset, other) for dataset in project.eval_datasets for other in trained
    ]


def build_regularisation_checks(project: Project) -> list[dg.AssetChecksDefinition]:
    """Return for each regularisation dataset a check `may_repeat_<dataset>` against each dataset that is trained as usual.

    An image in both is trained towards itself and towards what the base model makes of it, which work against each other.
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
    name = f"may_repeat_{other.asset_name}"

    @dg.asset_check(
        asset=dataset_key(project, dataset, "dataset"),
        name=name,
        description=f"No regularisation image is also an ordinary training image of {other.id}.",
        additional_ins={
            "trained": dg.AssetIn(key=dataset_key(project, other, "dataset"), dagster_type=pd.DataFrame)
        },
    )
    def regularisation_check(scanned: pd.DataFrame, trained: pd.DataFrame) -> dg.AssetCheckResult:
        kept, ordinary = (frame[frame["status"] == "kept"] for frame in (scanned, trained))
        names = dict(zip(ordinary["key"], ordinary["path"], strict=True))
        same = kept[kept["key"].isin(names)]
        shown = [f"{path} = {names[key]}" for path, key in zip(same["path"], same["key"], strict=True)]
        hint = " Remove them from one of the two." if shown else ""
        return result(
            name,
            not shown,
            f"{len(shown)} of {len(kept)} regularisation images are also ordinary training images of {other.id}{_names(shown)}.{hint}",
        )

    return regularisation_check


def _build_leak_check(
    project: Project, dataset: ImageDataset, other: ImageDataset
) -> dg.AssetChecksDefinition:
    name = f"may_leak_from_{other.asset_name}"

    @dg.asset_check(
        asset=dataset_key(project, dataset, "dataset"),
        name=name,
        description=_LEAK_DESCRIPTION,
        additional_ins={
            "trained": dg.AssetIn(key=dataset_key(project, other, "dataset"), dagster_type=pd.DataFrame)
        },
    )
    def leak_check(storage: Storage, scanned: pd.DataFrame, trained: pd.DataFrame) -> dg.AssetCheckResult:
        train = trained[trained["status"] == "kept"]
        evaluation = scanned[scanned["status"] == "kept"]
        return _leaks(name, storage.data_dir(other), train, storage.data_dir(dataset), evaluation)

    return leak_check


def _captions_present(
    scanned: pd.DataFrame, kept: pd.DataFrame, dataset: ImageDataset
) -> dg.AssetCheckResult:
    # Only images have a caption status; other files have none.
    uncaptioned = scanned[~scanned["caption_status"].isin(["", "ok"])]
    captionable = len(kept) + int((uncaptioned["status"] == "dropped").sum())
    share = len(uncaptioned) / captionable if captionable else 0.0
    hint = ' Add the captions, or write "missing_captions": "empty" to train these images without text.'
    return result(
        "captions_present",
        dataset.missing_captions == "empty" or share <= MISSING_CAPTIONS_LIMIT,
        f"{len(uncaptioned)} of {captionable} images ({share:.0%}) have no usable caption."
        + (hint if share else ""),
    )


def files_accounted_for(scanned: pd.DataFrame, kept: pd.DataFrame) -> dg.AssetCheckResult:
    """Whether every file that was found is kept or has a reason why not, and stands once."""
    dropped = scanned[scanned["status"] == "dropped"]
    unexplained = int((dropped["reason"] == "").sum())
    twice = int(scanned["path"].duplicated().sum())
    blank = int(((kept["key"] == "") | (kept["width"] <= 0) | (kept["reason"] != "")).sum())
    faults = {"without a reason": unexplained, "listed twice": twice, "kept although never read": blank}
    told = "".join(f" {count} {fault}!" for fault, count in faults.items() if count)
    return result(
        "files_accounted_for",
        len(scanned) == len(kept) + len(dropped) and not told,
        f"{len(scanned)} found = {len(kept)} kept + {len(dropped)} dropped{_counted(dropped['reason'])}.{told}",
    )


def _near_duplicates(kept: pd.DataFrame, dataset: ImageDataset, folder: Path) -> dg.AssetCheckResult:
    found = find_near_duplicates(kept)
    copies = sum(len(paths) - 1 for paths in found.same)
    alike = sum(len(group.paths) for group in found.alike)
    told = [f"{copies} files are copies of others{_names([' = '.join(paths[:3]) for paths in found.same])}"]
    if dataset.find_near_duplicates:
        at_least = "" if found.complete else "at least "
        names = _names([" ~ ".join(group.paths[:3]) for group in found.alike])
        told.append(f"{at_least}{alike} images look alike, in {len(found.alike)} groups{names}")
    else:
        told.append("look-alikes were not searched, since find_near_duplicates is off")
    if found.featureless:
        told.append(f"{found.featureless} flat or evenly shaded ones cannot be compared")
    hint = " Each of them is trained on: remove those that are not meant." if copies or alike else ""
    groups = [group.paths for group in found.alike] + list(found.same)
    sheet = [[(folder / path, path) for path in paths] for paths in groups]
    return result(
        "may_look_alike",
        not groups,
        "; ".join(told) + "." + hint,
        _sheet(sheet, "images that look alike, in rows"),
    )


def _shared_captions(kept: pd.DataFrame, dataset: ImageDataset) -> dg.AssetCheckResult:
    name = "may_share_captions"
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return result(name, True, "All images share the instance prompt, as the settings say.")
    captions = kept.drop_duplicates("key")["captions"].explode().dropna()
    captions = captions[captions.str.strip() != ""]  # images that are meant to be trained without text
    # a caption that one image has twice counts once
    counts = captions.reset_index().drop_duplicates()["captions"].value_counts()
    shared = counts[counts >= SHARED_CAPTION_LIMIT]
    told = [f"{str(caption)[:80]!r} ({count})" for caption, count in shared.head(_NAMED).items()]
    more = f" and {len(shared) - _NAMED} more" if len(shared) > _NAMED else ""
    return result(
        name,
        shared.empty,
        f"{len(shared)} of {len(counts)} captions are shared by {SHARED_CAPTION_LIMIT} different images or more"
        + (
            f": {', '.join(told)}{more}. What sets these images apart is not learned from their text."
            if told
            else "."
        ),
    )


def _leaks(
    name: str, train_folder: Path, train: pd.DataFrame, folder: Path, evaluation: pd.DataFrame
) -> dg.AssetCheckResult:
    """Result of the check `name`: which of the images `evaluation` in `folder` stand among those trained on."""
    if evaluation.empty:
        return result(
            name,
            False,
            f"There are no evaluation images to compare with the {len(train)} that are trained on. A dataset holds images out from "
            f"{MINIMA[-1][0]} images on: add images, or an eval dataset.",
        )
    leaks, complete = find_leaks(train, evaluation)
    told = [f"{leak.eval_path} {'=' if leak.same else '~'} {leak.train_path}" for leak in leaks]
    sheet = [
        [
            (folder / leak.eval_path, f"eval: {leak.eval_path}"),
            (train_folder / leak.train_path, f"train: {leak.train_path}"),
        ]
        for leak in leaks
    ]
    blind = int((train["phash"] == "").sum() + (evaluation["phash"] == "").sum())
    return result(
        name,
        not leaks,
        f"{'' if complete else 'At least '}{len(leaks)} of {len(evaluation)} evaluation images are trained on, or look like one "
        f"that is{_names(told)}."
        + (f" {blind} were compared by their bytes alone: find_near_duplicates is off." if blind else "")
        + (" The eval loss is better than it should be: remove them from one side." if leaks else ""),
        _sheet(sheet, "evaluation images beside what is trained on"),
    )


def _counted(reasons: "pd.Series[str]") -> str:
    """How often there is each reason, the most frequent first."""
    counts = Counter(reasons.tolist()).most_common()
    told = [f"{count} {reason}" for reason, count in counts[:NAMES_SHOWN]]
    if len(counts) > NAMES_SHOWN:
        told.append(f"{sum(count for _, count in counts[NAMES_SHOWN:])} for other reasons")
    return f" ({', '.join(told)})" if told else ""


def _names(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" ({', '.join(names[:_NAMED])}{more})" if names else ""


def _sheet(groups: Sequence[Sequence[tuple[Path, str]]], alt: str) -> dict[str, dg.MetadataValue]:
    if not groups:
        return {}
    return {"images": inline_image(grouped_sheet(groups[:GROUPS_SHOWN]), alt)}
