r"""Caption filter lists, which remove or replace phrases that captioning models repeat.

A line is one of
- literal text, of which every occurrence is removed;
- a regular expression, recognized by any of the characters \ ^ $ * + ? { } [ ] | ( ): its own text is removed first, then its
  matches (a full stop alone does not make an expression, so that "e.g." removes nothing else);
- s/find/replace/, where `find` is a regular expression: its first match is replaced, or every match with s/find/replace/g; `i`
  ignores case, and \/ is a slash.

Expressions are those of the `regex` library, which unlike Python's `re` supports a timeout.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import regex

from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.captions.text_files import OK, CaptionError, decode_text
from sdxl_pipeline.files.digest import digest_json

SECONDS_PER_CAPTION = 5.0
"""Timeout of one expression on one caption; a well-formed expression takes microseconds."""

_EXPRESSION = regex.compile(r"[\\^$*+?{}\[\]|()]")
_REPLACEMENT = regex.compile(r"s/((?:[^/\\]|\\.)*)/((?:[^/\\]|\\.)*)(?:/([gi]*))?")
_REPEATS = regex.compile(r"[*+{]")
_REPEATED_GROUP = regex.compile(r"\)[*+{]")
_LONG_CAPTION_CHARACTERS = 10_000
_BLANKS = regex.compile(r"[ \t]{2,}")


@dataclass(frozen=True)
class _Rule:
    line: str
    literal: str
    pattern: "regex.Pattern[str] | None" = None
    replacement: str = ""
    count: int = 0
    """Maximum number of replaced matches; 0 replaces all."""

    def substitute(self, text: str) -> str:
        """Return `text` with the pattern's matches replaced. Raise TimeoutError after SECONDS_PER_CAPTION."""
        if self.pattern is None:
            return text
        # A single repetition over a text of usual length is fast, and the timeout costs more than the match.
        may_be_slow = (
            len(text) > _LONG_CAPTION_CHARACTERS
            or len(_REPEATS.findall(self.line)) > 1
            or _REPEATED_GROUP.search(self.line) is not None
        )
        timeout = SECONDS_PER_CAPTION if may_be_slow else None
        return self.pattern.sub(self.replacement, text, count=self.count, timeout=timeout)


@dataclass(frozen=True)
class CaptionFilter:
    """A compiled filter list."""

    rules: tuple[_Rule, ...]
    literal_lines: tuple[str, ...]
    """Lines that are not valid regular expressions despite their special characters; only their own text is removed."""
    where: str

    def apply(self, caption: str) -> str:
        """Return the caption after every line in turn; after a line that changes it, blanks are collapsed and the ends stripped.

        Raises CaptionError with the line of an expression that exceeds the timeout.
        """
        for rule in self.rules:
            try:
                filtered = rule.substitute(caption.replace(rule.literal, "") if rule.literal else caption)
            except TimeoutError as error:
                raise CaptionError(
                    f"{self.where}: {rule.line!r} takes more than {SECONDS_PER_CAPTION:g} seconds on the caption {caption[:100]!r}. "
                    "Write it without repetitions inside repetitions, such as (a+)+."
                ) from error
            if filtered != caption:
                caption = _BLANKS.sub(" ", filtered).strip()
        return caption


def load_caption_filter(dataset: ImageDataset) -> CaptionFilter | None:
    """Return the dataset's compiled filter list; None if it has none. Raise CaptionError if it cannot be used."""
    if not dataset.caption_filter_list:
        return None
    where = f"dataset {dataset.id!r} in multidatabackend.json: caption_filter_list"
    rules: list[_Rule] = []
    literal_lines: list[str] = []
    for line in filter_lines(dataset.caption_filter_list, where):
        rule = _read_line(line, where)
        rules.append(rule)
        if rule.pattern is None and _EXPRESSION.search(line):
            literal_lines.append(line)
    return CaptionFilter(tuple(rules), tuple(literal_lines), where)


def filter_digest(filter_list: Path | tuple[str, ...] | None) -> str:
    """Return a digest of a filter list's lines, independent of where they are stored; "" if there is none or it cannot be read."""
    try:
        return digest_json(filter_lines(filter_list, "")) if filter_list else ""
    except CaptionError:
        return ""


def filter_lines(filter_list: Path | tuple[str, ...], where: str) -> list[str]:
    """Return the non-blank lines of a filter list, with their leading and trailing blanks. Raise CaptionError if it cannot be read."""
    if isinstance(filter_list, Path):
        filter_list = tuple(_read_file(filter_list, f"{where} {str(filter_list)!r}"))
    return [line for line in filter_list if line.strip()]


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
            f'{where} is not valid JSON: {error}. Write a list, such as ["arafed", "^there is"].'
        ) from error
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise CaptionError(f'{where} is not a list of strings. Write one, such as ["arafed", "^there is"].')
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
        raise CaptionError(f"{where}: {line!r} is not a valid replacement. {example}")
    find, replacement, flags = match[1].replace(r"\/", "/"), match[2].replace(r"\/", "/"), match[3] or ""
    try:
        pattern = regex.compile(find, regex.IGNORECASE if "i" in flags else 0)
        # the replacement is validated only if there is a match, so make the empty text match
        regex.compile(f"(?:{find})|").sub(replacement, "")
    except (regex.error, IndexError) as error:
        raise CaptionError(
            f"{where}: {line!r} is not a valid regular expression: {error}. {example}"
        ) from error
    return _Rule(line, "", pattern, replacement, 0 if "g" in flags else 1)
