"""Selection of the images of a dataset that are held out of training for evaluation.

A held-out image must not become a training image while its file exists: a LoRA trained on it would be evaluated on it. A stateless rule
cannot guarantee both that and a minimum number: if every set of 8 images has one held out and no added image releases one, then all but 7
of any larger set are held out. Therefore the selection is recorded.
"""

from collections.abc import Collection
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from sdxl_pipeline.data.buckets.hash_rng import below_share, hash_uint64
from sdxl_pipeline.data.quality.near_duplicates import find_near_duplicates
from sdxl_pipeline.files.atomic_files import write_text_atomic

MINIMA = ((20, 2), (8, 1))
"""(minimum dataset size, minimum number of held-out images); below the last size no further image is held out."""


class HoldoutError(ValueError):
    """The record of held-out images cannot be read."""


class HoldoutRecord(BaseModel):
    """Content keys of the images that a dataset has held out so far, and the share at that time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float
    keys: tuple[str, ...]


def hold_out(images: pd.DataFrame, share: float, record: Path) -> frozenset[str]:
    """Return the content keys of the images to hold out, and add them to `record`, a JSON file.

    Recorded keys stay held out unless `share` was lowered since, which restarts the selection. `images` is described in
    `choose_held_out`. Raises HoldoutError if the record is corrupt.
    """
    if share <= 0:
        record.unlink(missing_ok=True)
        return frozenset()
    try:
        before = HoldoutRecord.model_validate_json(record.read_bytes())
    except FileNotFoundError:
        before = HoldoutRecord(share=share, keys=())
    except ValidationError as error:
        raise HoldoutError(
            f"{record} is corrupt, so it is unknown which images were held out of training. Restore it, or delete it to select them again"
        ) from error
    recorded = before.keys if share >= before.share else ()
    held_out = choose_held_out(images, share, recorded)
    # keys of missing files stay recorded, since the files may return
    after = HoldoutRecord(share=share, keys=tuple(sorted(held_out.union(recorded))))
    if after != before or not record.exists():
        write_text_atomic(record, after.model_dump_json(indent=1) + "\n")
    return held_out


def choose_held_out(images: pd.DataFrame, share: float, recorded: Collection[str]) -> frozenset[str]:
    """Return the content keys of the images to hold out: those of `recorded` that are present, and about `share` of the rest.

    `images` are the candidates for training, with the columns path, key, phash and status. Near duplicates are in the same split. The
    selection follows a hash of the content. At least one of 8 images is held out, at least two of 20. Beyond `recorded`, at most half
    of the images are held out; a larger group of near duplicates is split if the minimum cannot be reached otherwise.
    """
    group_of = _groups(images)
    keys, names = group_of.index, group_of.unique().tolist()
    duplicated = group_of[group_of.duplicated(keep=False)]
    members = {name: tuple(group_keys.index) for name, group_keys in duplicated.groupby(duplicated)}
    held_out = set(keys[keys.isin(list(recorded))])
    maximum = len(keys) // 2
    minimum = next((least for count, least in MINIMA if len(keys) >= count), 0)
    hash_values = hash_uint64(f"holdout/{name}" for name in names)[:, 0]
    is_chosen = below_share(hash_values, share) if minimum else np.full(len(names), False)
    hash_order = np.argsort(hash_values, kind="stable")

    def add(name: str, limit: int) -> None:
        new = [key for key in members.get(name, (name,)) if key not in held_out]
        if len(held_out) + len(new) <= limit:
            held_out.update(new)

    for name in group_of[sorted(held_out)].unique():
        add(name, limit=maximum)
    for index in hash_order[is_chosen[hash_order]]:
        # skip a group of near duplicates that would exceed the share by far
        add(
            names[index],
            limit=min(maximum, ceil(2 * share * len(keys))) if names[index] in members else maximum,
        )
    if len(held_out) < minimum:
        candidates = [names[index] for index in hash_order]
        for name in sorted(candidates, key=lambda name: len(members.get(name, "1"))):
            if len(held_out) < minimum:
                add(name, limit=maximum)
        rest = [key for name in candidates for key in members.get(name, (name,)) if key not in held_out]
        held_out.update(rest[: max(0, minimum - len(held_out))])
    return frozenset(held_out)


def _groups(images: pd.DataFrame) -> "pd.Series[str]":
    """Return for each content key the smallest key in its group of near duplicates."""
    key_of = dict(zip(images["path"].tolist(), images["key"].tolist(), strict=True))
    keys = sorted(set(key_of.values()))
    name_of = dict(zip(keys, keys, strict=True))
    for group in find_near_duplicates(images).near_duplicates:
        group_keys = [key_of[path] for path in group.paths]
        name_of.update(dict.fromkeys(group_keys, min(group_keys)))
    return pd.Series(name_of, dtype="str")
