"""Further captions made by changing the order of tags, so that a model does not learn their order."""

import hashlib
import re

from sdxl_pipeline.config.schema.datasets import CaptionShuffle

# A full stop ends a sentence where a blank or nothing follows: not in "3.5 mm" or "example.com".
_SPLIT = {
    name: re.compile(mark) for name, mark in {"comma": ",", "space": " ", "period": r"\.(?=\s|$)"}.items()
}
_JOIN = {"comma": ", ", "space": " ", "period": ". "}
_DRAWS = 10  # for each caption wanted, before the orders are taken to be used up


def shuffled_captions(caption: str, settings: CaptionShuffle) -> list[str]:
    """The caption as written (if `include_original`), and up to `count` others with its tags in another order.

    The first `position_start` tags keep their place. The orders are drawn from (seed, caption) alone: the same on every machine, and
    another caption's do not change them. No two are equal, so a caption of few tags gives fewer; one with less than two tags to
    move gives itself only. Tags are trimmed and empty ones left out; a full stop at the end stays there. One within a number
    or a name ("3.5 mm") does not end a tag.
    """
    tags = [tag for part in _SPLIT[settings.split_on].split(caption) if (tag := part.strip())]
    fixed, movable = tags[: settings.position_start], tags[settings.position_start :]
    if not settings.enable or len(set(movable)) < 2:
        return [caption]
    join = _JOIN[settings.split_on]
    end = "." if settings.split_on == "period" and caption.rstrip().endswith(".") else ""
    as_written = join.join(tags) + end
    others: dict[str, None] = {}
    for draw in range(settings.count * _DRAWS):
        if len(others) == settings.count:
            break
        order = sorted(range(len(movable)), key=lambda tag: _chance(settings.seed or 0, caption, draw, tag))
        other = join.join(fixed + [movable[tag] for tag in order]) + end
        if other != as_written:
            others[other] = None
    return [caption, *others] if settings.include_original else [*others]


def _chance(seed: int, caption: str, draw: int, tag: int) -> bytes:
    return hashlib.sha256(f"shuffle/{seed}/{draw}/{tag}/{caption}".encode()).digest()
