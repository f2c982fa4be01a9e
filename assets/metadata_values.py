"""Images, tables and lists as metadata values small enough for the event log; the full-size files are stored on disk."""

import base64
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from PIL import Image

from sdxl_pipeline.data.quality.contact_sheets import to_jpeg

if TYPE_CHECKING:
    import pandas as pd

MAX_IMAGE_BYTES = 300_000
"""Largest JPEG in a metadata value: the event log's database grows by about four times its size."""
MAX_CARD_IMAGE_BYTES = 100_000
"""Largest JPEG of a model card, which has several."""
MAX_NAMES = 20

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)


def inline_image(image: Image.Image | Path | str, alt: str) -> dg.MetadataValue:
    """Return an image that the UI renders inline, as a JPEG of at most 300 KB."""
    return dg.MetadataValue.md(_encode_jpeg(image, alt, MAX_IMAGE_BYTES))


def model_card(path: Path) -> dg.MetadataValue:
    """Return a model card for the UI, which renders neither front matter nor images by relative path.

    Images beside the card are embedded as JPEGs of at most 100 KB; links to other files beside it become their names.
    """
    text = path.read_text(encoding="utf-8")
    body = text.split("\n---\n", 1)[-1] if text.startswith("---") else text

    def render(link: re.Match[str]) -> str:
        target = (path.parent / link["target"]).resolve()
        if not target.is_relative_to(path.parent.resolve()) or not target.exists():
            return link[0]
        if link["image"]:
            return _encode_jpeg(target, link["text"], MAX_CARD_IMAGE_BYTES)
        return f"`{link['target']}`"

    parts = _CODE.split(body.replace("<Gallery />", ""))  # only the Hub renders this tag
    return dg.MetadataValue.md(
        "".join(part if part.startswith("```") else _LINK.sub(render, part) for part in parts)
    )


def _encode_jpeg(image: Image.Image | Path | str, alt: str, max_bytes: int) -> str:
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    encoded = base64.b64encode(to_jpeg(image, max_bytes=max_bytes)).decode("ascii")
    return f"![{alt}](data:image/jpeg;base64,{encoded})"


def dropped_table(dropped: "pd.DataFrame") -> dg.MetadataValue:
    """Return a table of dropped files: one row per reason, with its first names. `dropped` has the columns path, reason."""
    records = [
        dg.TableRecord(
            {
                "reason": str(reason),
                "files": len(rows),
                "names": ", ".join(rows["path"].head(MAX_NAMES))
                + (f" and {len(rows) - MAX_NAMES} more" if len(rows) > MAX_NAMES else ""),
            }
        )
        for reason, rows in dropped.groupby("reason", sort=True)
    ]
    columns = [
        dg.TableColumn("reason", "string"),
        dg.TableColumn("files", "int"),
        dg.TableColumn("names", "string"),
    ]
    return dg.MetadataValue.table(records, schema=dg.TableSchema(columns=columns))


def names_list(names: Iterable[str]) -> dg.MetadataValue:
    """Return a Markdown list of the first 20 names and the number of further ones."""
    names = list(names)
    lines = [f"- {name}" for name in names[:MAX_NAMES]]
    if len(names) > MAX_NAMES:
        lines.append(f"- and {len(names) - MAX_NAMES} more")
    return dg.MetadataValue.md("\n".join(lines) or "none")


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> dg.MetadataValue:
    """Return a Markdown table; floats have four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def drop_none(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries that have a value, so that a rate that was not measured is absent rather than zero."""
    return {name: value for name, value in metadata.items() if value is not None}
