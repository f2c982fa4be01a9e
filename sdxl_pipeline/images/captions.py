"""Captions of one picture, by SimpleTuner's strategies: the file's name, a text file beside it, or one prompt for all."""

import codecs
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sdxl_pipeline.project.datasets import ImageDataset

OK = "ok"
MISSING = "missing"
EMPTY = "empty"
UNDECODABLE = "undecodable"
UNREADABLE = "unreadable"

DROP_REASONS = {
    MISSING: "no caption file",
    EMPTY: "caption is empty",
    UNDECODABLE: "caption file is neither UTF-8 nor UTF-16 with a byte order mark",
    UNREADABLE: "caption file cannot be read",
}


@dataclass(frozen=True)
class Captions:
    """The captions of one picture, and how they were come by."""

    texts: tuple[str, ...]
    status: str
    """"ok", or why there was no caption to be had: "missing", "empty", "undecodable", "unreadable"."""

    @property
    def drop_reason(self) -> str:
        """Why the picture cannot be trained on; empty when it has a caption, if only the empty one by its policy."""
        return "" if self.texts else DROP_REASONS[self.status]


def captions_of(dataset: ImageDataset, picture: str, text_file: Path | None) -> Captions:
    """Captions of the picture at the relative path `picture`; `text_file` is the caption file found beside it, if any.

    `only_instance_prompt` and the strategy `instanceprompt` give the instance prompt, whatever the files say.
    `prepend_instance_prompt` gives "prompt caption". A picture without caption follows the dataset's `missing_captions`: "drop"
    gives no texts, "empty" the empty caption (prefixed like any other).
    """
    prompt = dataset.instance_prompt or ""
    if dataset.only_instance_prompt or dataset.caption_strategy == "instanceprompt":
        return _captions([prompt], OK, dataset)
    if dataset.caption_strategy == "filename":
        found = _captions([caption_from_filename(picture)], OK, dataset)
    else:
        found = _captions(*read_text_file(text_file), dataset)
    if not dataset.prepend_instance_prompt:
        return found
    return Captions(tuple(f"{prompt} {text}" if text else prompt for text in found.texts), found.status)


def caption_from_filename(picture: str) -> str:
    """The file's stem with underscores as spaces, and nothing else changed."""
    return PurePosixPath(picture).stem.replace("_", " ")


def read_text_file(path: Path | None) -> tuple[list[str], str]:
    """One caption per line that is not blank, and the status. Any line ends; UTF-8, or UTF-16 with a byte order mark."""
    if path is None:
        return [], MISSING
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], MISSING
    except OSError:
        return [], UNREADABLE
    try:
        text = data.decode(
            "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        )
    except UnicodeDecodeError:
        return [], UNDECODABLE
    if "\0" in text:  # UTF-16 without its mark, or no text at all
        return [], UNDECODABLE
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return [line.strip() for line in lines], OK


def _captions(texts: list[str], status: str, dataset: ImageDataset) -> Captions:
    filled = tuple(text for text in texts if text.strip())
    if status == OK and not filled:
        status = EMPTY
    if not filled and dataset.missing_captions == "empty":
        filled = ("",)
    return Captions(filled, status)
