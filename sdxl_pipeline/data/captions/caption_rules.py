"""The caption of an image: its source, its rules and the shuffling of its tags.

Reading files is separate (sdxl_pipeline.data.scan.image_reader, .caption_tables). The rules here apply the dataset's settings to the
texts in this order: filter list, shuffled variants, prepended instance prompt.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from sdxl_pipeline.config.schema.datasets import CaptionShuffle, ImageDataset, TextEmbedsDataset
from sdxl_pipeline.data.captions.caption_filters import CaptionFilter, load_caption_filter
from sdxl_pipeline.data.captions.caption_tables import AMBIGUOUS, MISSING
from sdxl_pipeline.data.captions.text_files import OK, UNDECODABLE
from sdxl_pipeline.data.scan.file_listing import split_suffix

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


EMPTY = "empty"
FILTERED = "filtered"
UNREADABLE = "unreadable"
TOO_LARGE = "too large"

_DROP_REASONS = {
    EMPTY: "caption is empty",
    FILTERED: "caption is empty after the filter list",
    UNDECODABLE: "caption file is neither UTF-8 nor UTF-16 with a byte order mark",
    UNREADABLE: "caption file cannot be read",
    TOO_LARGE: "caption file is larger than 1 MB",
    AMBIGUOUS: "caption table has a file name without folder that several images share",
}
_MISSING_FROM = {
    "textfile": "no caption file",
    "parquet": "no caption in the table",
    "csv": "no caption in the list",
    "huggingface": "no caption in the column",
}


class Captions(NamedTuple):
    """The captions of one image and their status."""

    texts: tuple[str, ...]
    """Empty if the image cannot be trained on; one empty caption if it has none and its dataset allows that."""
    status: str
    """"ok", or the reason: "missing", "empty", "filtered", "undecodable", "unreadable", "too large", "ambiguous"."""


class CaptionRules:
    """A dataset's rules that turn the texts read for an image into its captions."""

    def __init__(self, dataset: ImageDataset, caption_filter: CaptionFilter | None) -> None:
        self.dataset = dataset
        self.text_source = _text_source_of(dataset)
        """"name", "textfile", "parquet", "csv" or "huggingface"; "" if the instance prompt is the only caption."""
        self._filter = caption_filter
        self._shuffle = (
            dataset.caption_shuffle if dataset.caption_shuffle and dataset.caption_shuffle.enable else None
        )
        self._prompt = dataset.instance_prompt or ""

    def captions_for(self, image: str, texts: Sequence[str] = (), status: str = OK) -> Captions:
        """Return the captions of the image at the relative path `image`, for which `texts` were read with `status`.

        `only_instance_prompt` and the strategy `instanceprompt` give the instance prompt. `prepend_instance_prompt` gives
        "prompt caption". For an image without caption the dataset's `missing_captions` applies: "drop" gives no texts, "empty" the
        empty caption (prefixed like any other). Duplicate captions of an image are removed.
        """
        if not self.text_source:
            return Captions((self._prompt,), OK)
        if self.text_source == "name":
            texts, status = (caption_from_filename(image),), OK
        captions = [text for text in texts if text and not text.isspace()]
        if status == OK and not captions:
            status = EMPTY
        if self._filter is not None and captions:
            captions = [filtered for text in captions if (filtered := self._filter.apply(text))]
            status = status if captions else FILTERED
        if not captions:
            captions = [""] if self.dataset.missing_captions == "empty" else []
        elif self._shuffle is not None:
            captions = [variant for text in captions for variant in shuffled_captions(text, self._shuffle)]
        if self.dataset.prepend_instance_prompt:
            captions = [f"{self._prompt} {text}" if text else self._prompt for text in captions]
        return Captions(tuple(dict.fromkeys(captions)) if len(captions) > 1 else tuple(captions), status)

    def drop_reason(self, captions: Captions) -> str:
        """Return the reason why an image with these captions cannot be trained on; "" if it can."""
        if captions.texts:
            return ""
        if captions.status == MISSING:
            return _MISSING_FROM.get(self.dataset.caption_strategy, "no caption")
        return _DROP_REASONS[captions.status]


def _text_source_of(dataset: ImageDataset) -> str:
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return ""
    return "name" if dataset.caption_strategy == "filename" else dataset.caption_strategy


def caption_rules(dataset: ImageDataset) -> CaptionRules:
    """Return the caption rules of a dataset with its filter list read. Raise CaptionError if that cannot be used."""
    return CaptionRules(dataset, load_caption_filter(dataset))


def complete_caption_settings(
    dataset: ImageDataset, text_embeds: TextEmbedsDataset, seed: int | None
) -> ImageDataset:
    """Return the dataset with defaults for its captions: the filter list of its text_embeds entry, the training seed for shuffling."""
    updates: dict[str, object] = {}
    if dataset.caption_filter_list is None:
        updates["caption_filter_list"] = text_embeds.caption_filter_list
    if dataset.caption_shuffle is not None and dataset.caption_shuffle.seed is None:
        updates["caption_shuffle"] = dataset.caption_shuffle.model_copy(update={"seed": seed or 0})
    return dataset.model_copy(update=updates)


def caption_from_filename(image: str) -> str:
    """Return the file's stem with underscores replaced by spaces."""
    return split_suffix(image)[0].rpartition("/")[2].replace("_", " ")


def captions_in(text: str, one: bool) -> list[str]:
    """Return the captions in a text file, trimmed: one per line, or the whole text if `one`. Blank lines give empty captions."""
    if one or "\n" not in text:
        return [text.strip()]
    return [line.strip() for line in text.split("\n")]
