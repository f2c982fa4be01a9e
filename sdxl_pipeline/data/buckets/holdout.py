"""Which images of a dataset are held out of training, to measure the LoRA by.

A held-out image must never become a training image while its file stays: a LoRA that has seen it would be judged by it. A rule without
memory cannot promise that and a minimum number too: if every set of 8 images holds one out and no added image releases one, then of any
larger set all but 7 are held out. So what was held out is recorded.
"""

from collections.abc import Collection
from math import ceil
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError

from sdxl_pipeline.data.buckets.hash_rng import chosen, fractions
from sdxl_pipeline.data.quality.near_duplicates import find_near_duplicates
from sdxl_pipeline.files.atomic_files import write_text_atomic

MINIMA = ((20, 2), (8, 1))
"""(images of a dataset, images that are held out of so many at least); below the last none is newly held out."""


class HoldoutError(ValueError):
    """The record of held-out images cannot be read."""


class HoldoutRecord(BaseModel):
    """The images that a dataset has held out so far, by content key, and the share it did so at."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float
    keys: tuple[str, ...]


def hold_out(images: pd.DataFrame, share: float, record: Path) -> frozenset[str]:
    """Return the content keys of the images to hold out, and add them to `record`, a JSON file.

    What the record names stays held out unless `share` was lowered since, which starts it anew. `images` is as `choose_held_out` takes it.
    Raises HoldoutError when the record is damaged.
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
            f"{record} is damaged, so it is unknown which images were held out of training. Restore it, or delete it to choose them anew"
        ) from error
    recorded = before.keys if share >= before.share else ()
    held_out = choose_held_out(images, share, recorded)
    # keys whose files are gone are kept, since the files may come back
    after = HoldoutRecord(share=share, keys=tuple(sorted(held_out.union(recorded))))
    if after != before or not record.exists():
        write_text_atomic(record, after.model_dump_json(indent=1) + "\n")
    return held_out


def choose_held_out(images: pd.DataFrame, share: float, recorded: Collection[str]) -> frozenset[str]:
    """Return the content keys of the images to hold out: those of `recorded` that are there, and about `share` of the rest.

    `images` are those that would be trained otherwise, with the columns path, key, phash and status. Images that look alike stay on one
    side. The choice follows a hash of the content. From 8 images on at least one is held out, from 20 on two. Beyond `recorded`, at most
    half of the images are held out; a larger group of look-alikes is split if there is no other way to reach the minimum.
    """
    group_of = _groups(images)
    keys, names = group_of.index, group_of.unique().tolist()
    several = group_of[group_of.duplicated(keep=False)]
    members = {name: tuple(same.index) for name, same in several.groupby(several)}
    held_out = set(keys[keys.isin(list(recorded))])
    room = len(keys) // 2
    minimum = next((least for count, least in MINIMA if len(keys) >= count), 0)
    order = fractions(f"holdout/{name}" for name in names)[:, 0]
    taken = chosen(order, share) if minimum else np.full(len(names), False)
    by_hash = np.argsort(order, kind="stable")

    def add(name: str, most: int) -> None:
        new = [key for key in members.get(name, (name,)) if key not in held_out]
        if len(held_out) + len(new) <= most:
            held_out.update(new)

    for name in group_of[sorted(held_out)].unique():
        add(name, most=room)
    for index in by_hash[taken[by_hash]]:
        # a group of look-alikes is not drawn where it would be far more than the share
        add(names[index], most=min(room, ceil(2 * share * len(keys))) if names[index] in members else room)
    if len(held_out) < minimum:
        candidates = [names[index] for index in by_hash]
        for name in sorted(candidates, key=lambda name: len(members.get(name, "1"))):
            if len(held_out) < minimum:
                add(name, most=room)
        rest = [key for name in candidates for key in members.get(name, (name,)) if key not in held_out]
        held_out.update(rest[: max(0, minimum - len(held_out))])
    return frozenset(held_out)


def _groups(images: pd.DataFrame) -> "pd.Series[str]":
    """Return for each content key the smallest key among the images that look like it."""
    key_of = dict(zip(images["path"].tolist(), images["key"].tolist(), strict=True))
    keys = sorted(set(key_of.values()))
    name_of = dict(zip(keys, keys, strict=True))
    for group in find_near_duplicates(images).alike:
        alike = [key_of[path] for path in group.paths]
        name_of.update(dict.fromkeys(alike, min(alike)))
    return pd.Series(name_of, dtype="str")
