"""Images and tables as asset metadata: small enough for the event log, the full ones stay on disk."""

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
"""Images live in the event log's database, which grows about four times their size."""
MAX_CARD_IMAGE_BYTES = 100_000
"""Each of a model card's, which has several."""
NAMES_SHOWN = 20

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^()\s]+)\)")
_CODE = re.compile(r"(```.*?```)", re.DOTALL)


def inline_image(image: Image.Image | Path | str, alt: str) -> dg.MetadataValue:
    """An image shown inline by the UI, as a JPEG of at most 300 KB."""
    return dg.MetadataValue.md(_encode_jpeg(image, alt, MAX_IMAGE_BYTES))


def model_card(path: Path) -> dg.MetadataValue:
    """Return a model card as the UI can show it, where neither front matter nor paths beside the card mean anything.

    Images beside the card become JPEGs of at most 100 KB in the text, and links to its other files their names.
    """
    text = path.read_text(encoding="utf-8")
    body = text.split("\n---\n", 1)[-1] if text.startswith("---") else text

    def shown(link: re.Match[str]) -> str:
        target = (path.parent / link["target"]).resolve()
        if not target.is_relative_to(path.parent.resolve()) or not target.exists():
            return link[0]
        if link["image"]:
            return _encode_jpeg(target, link["text"], MAX_CARD_IMAGE_BYTES)
        return f"`{link['target']}`"

    parts = _CODE.split(body.replace("<Gallery />", ""))  # which only the Hub shows
    return dg.MetadataValue.md(
        "".join(part if part.startswith("```") else _LINK.sub(shown, part) for part in parts)
    )


def _encode_jpeg(image: Image.Image | Path | str, alt: str, max_bytes: int) -> str:
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    encoded = base64.b64encode(to_jpeg(image, max_bytes=max_bytes)).decode("ascii")
    return f"![{alt}](data:image/jpeg;base64,{encoded})"


def dropped_table(dropped: "pd.DataFrame") -> dg.MetadataValue:
    """What was left out and why: a row per reason, with the first names. `dropped` has the columns path, reason."""
    records = [
        dg.TableRecord(
            {
                "reason": str(reason),
                "files": len(rows),
                "names": ", ".join(rows["path"].head(NAMES_SHOWN))
                + (f" and {len(rows) - NAMES_SHOWN} more" if len(rows) > NAMES_SHOWN else ""),
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
    """A Markdown list of the first names, and how many more there are."""
    names = list(names)
    lines = [f"- {name}" for name in names[:NAMES_SHOWN]]
    if len(names) > NAMES_SHOWN:
        lines.append(f"- and {len(names) - NAMES_SHOWN} more")
    return dg.MetadataValue.md("\n".join(lines) or "none")


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> dg.MetadataValue:
    """A Markdown table; floats with four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def drop_none(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that have a value: a rate of work that was not needed is left out rather than shown as zero."""
    return {name: value for name, value in metadata.items() if value is not None}


def appearances_range(range_: tuple[int, int] | None) -> str:
    """Return how often the images of a dataset appear in an epoch: "1", or "1 to 4" where they differ."""
    if range_ is None:
        return ""
    fewest, most = range_
    return str(fewest) if fewest == most else f"{fewest} to {most}"
