"""Captions of images, by SimpleTuner's strategies: what a file's name, a text file, a table or one prompt for all makes of them.

What is read from files stands apart (sdxl_pipeline.data.scan.image_reader, .caption_tables); here the dataset's settings make captions of it,
in this order: the filter list, the shuffled variants, the instance prompt before each.
"""

from collections.abc import Sequence
from typing import NamedTuple

from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.data.captions.caption_filters import CaptionFilter, caption_filter_of
from sdxl_pipeline.data.captions.caption_shuffle import shuffled_captions
from sdxl_pipeline.data.captions.caption_tables import AMBIGUOUS, MISSING
from sdxl_pipeline.data.captions.text_files import OK, UNDECODABLE
from sdxl_pipeline.data.scan.file_types import split_suffix

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
    AMBIGUOUS: "caption table names several images by this bare name",
}
_MISSING_FROM = {
    "textfile": "no caption file",
    "parquet": "no caption in the table",
    "csv": "no caption in the list",
    "huggingface": "no caption in the column",
}


class Captions(NamedTuple):
    """The captions of one image, and how they were come by."""

    texts: tuple[str, ...]
    """None when the image cannot be trained on; the empty caption when it has none and its dataset allows that."""
    status: str
    """"ok", or why there was none to be had: "missing", "empty", "filtered", "undecodable", "unreadable", "too large", "ambiguous"."""


class CaptionRules:
    """What a dataset's settings make of the texts that were read for an image."""

    def __init__(self, dataset: ImageDataset, caption_filter: CaptionFilter | None) -> None:
        self.dataset = dataset
        self.reads = _reads(dataset)
        """Where texts come from: "name", "textfile", "parquet", "csv", "huggingface"; "" when the instance prompt is all."""
        self._filter = caption_filter
        self._shuffle = (
            dataset.caption_shuffle if dataset.caption_shuffle and dataset.caption_shuffle.enable else None
        )
        self._prompt = dataset.instance_prompt or ""

    def captions_of(self, image: str, texts: Sequence[str] = (), status: str = OK) -> Captions:
        """Captions of the image at the relative path `image`, for which `texts` were read with this status.

        `only_instance_prompt` and the strategy `instanceprompt` give the instance prompt, whatever was read.
        `prepend_instance_prompt` gives "prompt caption". An image without caption follows the dataset's `missing_captions`: "drop"
        gives no texts, "empty" the empty caption (prefixed like any other). Equal captions of an image are one.
        """
        if not self.reads:
            return Captions((self._prompt,), OK)
        if self.reads == "name":
            texts, status = (caption_from_filename(image),), OK
        made = [text for text in texts if text and not text.isspace()]
        if status == OK and not made:
            status = EMPTY
        if self._filter is not None and made:
            made = [left for text in made if (left := self._filter.apply(text))]
            status = status if made else FILTERED
        if not made:
            made = [""] if self.dataset.missing_captions == "empty" else []
        elif self._shuffle is not None:
            made = [variant for text in made for variant in shuffled_captions(text, self._shuffle)]
        if self.dataset.prepend_instance_prompt:
            made = [f"{self._prompt} {text}" if text else self._prompt for text in made]
        return Captions(tuple(dict.fromkeys(made)) if len(made) > 1 else tuple(made), status)

    def drop_reason(self, captions: Captions) -> str:
        """Why an image with these captions cannot be trained on; empty when it can."""
        if captions.texts:
            return ""
        if captions.status == MISSING:
            return _MISSING_FROM.get(self.dataset.caption_strategy, "no caption")
        return _DROP_REASONS[captions.status]


def _reads(dataset: ImageDataset) -> str:
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return ""
    return "name" if dataset.caption_strategy == "filename" else dataset.caption_strategy


def caption_rules(dataset: ImageDataset) -> CaptionRules:
    """The caption settings of a dataset, its filter list read. Raises CaptionError."""
    return CaptionRules(dataset, caption_filter_of(dataset))


def complete_caption_settings(
    dataset: ImageDataset, text_embeds: TextEmbedsDataset, seed: int | None
) -> ImageDataset:
    """The dataset with what its captions take from elsewhere: its text_embeds entry's filter list, the training's seed for shuffling."""
    taken: dict[str, object] = {}
    if dataset.caption_filter_list is None:
        taken["caption_filter_list"] = text_embeds.caption_filter_list
    if dataset.caption_shuffle is not None and dataset.caption_shuffle.seed is None:
        taken["caption_shuffle"] = dataset.caption_shuffle.model_copy(update={"seed": seed or 0})
    return dataset.model_copy(update=taken)


def caption_from_filename(image: str) -> str:
    """The file's stem with underscores as spaces, and nothing else changed."""
    return split_suffix(image)[0].rpartition("/")[2].replace("_", " ")


def captions_in(text: str, one: bool) -> list[str]:
    """The captions that a text file holds: one per line that is not blank, or the whole text as `one`, trimmed."""
    if one or "\n" not in text:
        return [text.strip()]
    return [line.strip() for line in text.split("\n")]
