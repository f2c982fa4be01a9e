"""Shuffled variants of captions, so that a model does not learn the order of tags."""

import hashlib
import re

from sdxl_pipeline.config.schema.datasets import CaptionShuffle

# A full stop ends a sentence if a blank or nothing follows: not in "3.5 mm" or "example.com".
_SPLIT = {
    name: re.compile(mark) for name, mark in {"comma": ",", "space": " ", "period": r"\.(?=\s|$)"}.items()
}
_JOIN = {"comma": ", ", "space": " ", "period": ". "}
_ATTEMPTS_PER_CAPTION = 10  # attempts per requested caption before the distinct orders count as exhausted


def shuffled_captions(caption: str, settings: CaptionShuffle) -> list[str]:
    """Return the caption as written (if `include_original`) and up to `count` variants with its tags in another order.

    The first `position_start` tags keep their position. The orders are a function of (seed, caption): the same on every machine and
    independent of other captions. No two variants are equal, so a caption with few tags gives fewer; one with less than two tags to
    move gives only itself. Tags are trimmed and empty tags removed; a final full stop remains at the end. A full stop within a number
    or a name ("3.5 mm") does not end a tag.
    """
    tags = [tag for part in _SPLIT[settings.split_on].split(caption) if (tag := part.strip())]
    fixed, movable = tags[: settings.position_start], tags[settings.position_start :]
    if not settings.enable or len(set(movable)) < 2:
        return [caption]
    join = _JOIN[settings.split_on]
    ending = "." if settings.split_on == "period" and caption.rstrip().endswith(".") else ""
    as_written = join.join(tags) + ending
    variants: dict[str, None] = {}
    for attempt in range(settings.count * _ATTEMPTS_PER_CAPTION):
        if len(variants) == settings.count:
            break
        order = sorted(
            range(len(movable)), key=lambda tag: _sort_key(settings.seed or 0, caption, attempt, tag)
        )
        candidate = join.join(fixed + [movable[tag] for tag in order]) + ending
        if candidate != as_written:
            variants[candidate] = None
    return [caption, *variants] if settings.include_original else [*variants]


def _sort_key(seed: int, caption: str, attempt: int, tag: int) -> bytes:
    return hashlib.sha256(f"shuffle/{seed}/{attempt}/{tag}/{caption}".encode()).digest()
