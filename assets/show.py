"""Pictures and tables as asset metadata: small enough for the event log, the full ones stay on disk."""

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from PIL import Image

from sdxl_pipeline.images.pictures import to_jpeg

if TYPE_CHECKING:
    import pandas as pd

MAX_PICTURE_BYTES = 300_000
"""Pictures live in the event log's database, which grows about four times their size."""
NAMES_SHOWN = 20


def picture(image: Image.Image | Path | str, alt: str) -> dg.MetadataValue:
    """A picture shown inline by the UI, as a JPEG of at most 300 KB."""
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            image = opened.convert("RGB")
    encoded = base64.b64encode(to_jpeg(image, max_bytes=MAX_PICTURE_BYTES)).decode("ascii")
    return dg.MetadataValue.md(f"![{alt}](data:image/jpeg;base64,{encoded})")


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


def figures_table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> dg.MetadataValue:
    """A Markdown table; floats with four significant digits."""

    def cell(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell(value) for value in row) + " |" for row in rows]
    return dg.MetadataValue.md("\n".join(lines))


def present(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that have a value: a rate of work that was not needed is left out rather than shown as zero."""
    return {name: value for name, value in metadata.items() if value is not None}


def appearances_range(range_: tuple[int, int] | None) -> str:
    """Return how often the images of a dataset appear in an epoch: "1", or "1 to 4" where they differ."""
    if range_ is None:
        return ""
    fewest, most = range_
    return str(fewest) if fewest == most else f"{fewest} to {most}"
