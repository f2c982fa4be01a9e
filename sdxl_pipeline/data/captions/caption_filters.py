r"""The caption filter list: what captioning models repeat, taken out of every caption or replaced.

A line is one of
- literal text, removed wherever it stands;
- a regular expression, told by any of the characters \ ^ $ * + ? { } [ ] | ( ): its own text is removed first, then what it
  matches (a full stop alone makes no expression, so that "e.g." removes nothing else);
- s/find/replace/, where `find` is a regular expression: its first match is replaced, every one with s/find/replace/g; `i` ignores
  case, and \/ is a slash.

Expressions are those of the `regex` library, which unlike Python's own can be stopped when one would take for ever.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import regex

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.text_files import OK, CaptionError, decode_text
from sdxl_pipeline.files.digest import digest_json

SECONDS_PER_CAPTION = 5.0
"""How long one expression may take on one caption: a sound one takes microseconds."""

_EXPRESSION = regex.compile(r"[\\^$*+?{}\[\]|()]")
_REPLACEMENT = regex.compile(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)(?:/([gi]*))?")
_REPEATS = regex.compile(r"[*+{]")
_REPEATED_GROUP = regex.compile(r"\)[*+{]")
_LONG = 10_000
_BLANKS = regex.compile(r"[ \t]{2,}")


@dataclass(frozen=True)
class _Rule:
    line: str
    literal: str
    pattern: "regex.Pattern[str] | None" = None
    replacement: str = ""
    count: int = 0
    """How many matches are replaced; 0 is all of them."""

    def substitute(self, text: str) -> str:
        """`text` with the pattern's matches replaced. Raises TimeoutError when the pattern does not come to an end."""
        if self.pattern is None:
            return text
        # One plain repetition over a text of usual length cannot take long, and looking at the clock costs more than matching it.
        watched = (
            len(text) > _LONG
            or len(_REPEATS.findall(self.line)) > 1
            or _REPEATED_GROUP.search(self.line) is not None
        )
        timeout = SECONDS_PER_CAPTION if watched else None
        return self.pattern.sub(self.replacement, text, count=self.count, timeout=timeout)


@dataclass(frozen=True)
class CaptionFilter:
    """A filter list ready to be applied."""

    rules: tuple[_Rule, ...]
    taken_literally: tuple[str, ...]
    """Lines that look like regular expressions and are none; only their own text is removed."""
    where: str

    def apply(self, caption: str) -> str:
        """The caption after every line in turn. After a line that changes it, runs of blanks are made one and its ends are stripped.

        Raises CaptionError when an expression does not come to an end, naming it.
        """
        for rule in self.rules:
            try:
                left = rule.substitute(caption.replace(rule.literal, "") if rule.literal else caption)
            except TimeoutError as error:
                raise CaptionError(
                    f"{self.where}: {rule.line!r} takes more than {SECONDS_PER_CAPTION:g} seconds on the caption {caption[:100]!r}. "
                    "Write it without repetitions inside repetitions, such as (a+)+."
                ) from error
            if left != caption:
                caption = _BLANKS.sub(" ", left).strip()
        return caption


def caption_filter_of(dataset: ImageDataset) -> CaptionFilter | None:
    """The dataset's filter list, ready to be applied; None when it has none. Raises CaptionError."""
    if not dataset.caption_filter_list:
        return None
    where = f"dataset {dataset.id!r} in multidatabackend.json: caption_filter_list"
    rules: list[_Rule] = []
    taken_literally: list[str] = []
    for line in filter_lines(dataset.caption_filter_list, where):
        rule = _read_line(line, where)
        rules.append(rule)
        if rule.pattern is None and _EXPRESSION.search(line):
            taken_literally.append(line)
    return CaptionFilter(tuple(rules), tuple(taken_literally), where)


def filter_digest(listed: Path | tuple[str, ...] | None) -> str:
    """Digest of a filter list's lines, wherever they stand; "" for none, and for one that cannot be read yet."""
    try:
        return digest_json(filter_lines(listed, "")) if listed else ""
    except CaptionError:
        return ""


def filter_lines(listed: Path | tuple[str, ...], where: str) -> list[str]:
    """The lines of a filter list, blank ones left out; of a file they keep the blanks at their ends. Raises CaptionError."""
    if isinstance(listed, Path):
        listed = tuple(_read_file(listed, f"{where} {str(listed)!r}"))
    return [line for line in listed if line.strip()]


def _read_file(path: Path, where: str) -> list[str]:
    try:
        text, status = decode_text(path.read_bytes())
    except OSError as error:
        raise CaptionError(
            f"{where} cannot be read: {error.strerror}. Write the path of a text file with one entry per line, or of a JSON list."
        ) from error
    if status != OK:
        raise CaptionError(f"{where} is neither UTF-8 nor UTF-16 with a byte order mark. Save it as UTF-8.")
    if path.suffix.lower() != ".json":
        return text.split("\n")
    try:
        lines = json.loads(text)
    except ValueError as error:
        raise CaptionError(
            f'{where} is no JSON: {error}. Write a list, such as ["arafed", "^there is"].'
        ) from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise CaptionError(f'{where} holds no list of texts. Write one, such as ["arafed", "^there is"].')
    return lines


def _read_line(line: str, where: str) -> _Rule:
    if line.startswith("s/") and line.count("/") >= 2:
        return _read_replacement(line, where)
    if not _EXPRESSION.search(line):
        return _Rule(line, line)
    try:
        return _Rule(line, line, regex.compile(line))
    except regex.error:
        return _Rule(line, line)


def _read_replacement(line: str, where: str) -> _Rule:
    example = r"Write s/find/replace/, with \/ for a slash inside."
    match = _REPLACEMENT.fullmatch(line)
    if match is None or not match[1]:
        raise CaptionError(f"{where}: {line!r} is no replacement. {example}")
    find, replacement, flags = match[1].replace(r"\/", "/"), match[2].replace(r"\/", "/"), match[3] or ""
    try:
        pattern = regex.compile(find, regex.IGNORECASE if "i" in flags else 0)
        # a replacement is looked at only when there is a match, so let the empty text be one
        regex.compile(f"(?:{find})|").sub(replacement, "")
    except (regex.error, IndexError) as error:
        raise CaptionError(f"{where}: {line!r} is no regular expression: {error}. {example}") from error
    return _Rule(line, "", pattern, replacement, 0 if "g" in flags else 1)
