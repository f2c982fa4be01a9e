"""Every image decoded once, before anything is encoded: are its pixels sound, and what does it look like.

What was found is kept in a table by the content of the images, so an image is looked at once in its life, under whatever name.
"""

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.data.decoding.colour import to_eight_bits, to_srgb
from sdxl_pipeline.data.decoding.image_decoding import (
    UnreadableImage,
    decode,
    open_image,
    unexpected_as_unreadable,
    upright,
)
from sdxl_pipeline.data.decoding.integrity import decode_jpeg_small, png_damage
from sdxl_pipeline.data.decoding.memory_budget import Budget, pixel_memory
from sdxl_pipeline.files.atomic_files import atomic_path

CHANGED = "changed while the dataset was scanned; materialize the dataset again"
SAVE_SECONDS = 30.0
"""How often the table is written: a kill loses no more work than this."""

_VERSION_ENTRY, _VERSION = b"looks_version", b"2"  # raise it when what is found in an image changes
_BATCH = 1024
_SMALLEST_EDGE = 128
_GRID = 4  # parts across and down that an image's colours are taken of
_FILE_BYTES_AT_ONCE = 1 << 30


@dataclass(frozen=True, slots=True)
class _HashResult:
    phash: str = ""
    problem: str = ""
    lasting: bool = True  # False: says something of the file as it was just now, not of its content


def compute_hashes(
    folder: Path, frame: pd.DataFrame, table: Path, on_progress: Callable[[int, int], None] | None = None
) -> pd.DataFrame:
    """A scan's frame with `phash` filled in for its kept images, and those whose pixels are damaged dropped with a reason.

    `phash` is 80 hex digits. The first 16 are the 64-bit perceptual hash of the upright image, transparency over white: the signs
    of its lowest frequencies (imagehash.phash), which know no colour. The others are its colours: the excess of red over green in
    each of 4 x 4 parts, then that of blue over green, a byte each. A JPEG is decoded at a fraction of its size, though its coded data
    is read to the end.

    `table` is the Parquet file (key, phash, problem) of what was found before; images it has are not read. It is written by
    rename, every half minute. A file that is gone or changed since it was scanned is dropped, and not remembered.
    `on_progress(done, total)` counts the images that have to be looked at. No more than a few are in memory at a time.
    """
    known = _read_table(table)
    kept = (frame["status"] == "kept").to_numpy()
    places = pd.Index(known["key"]).get_indexer(pd.Index(frame["key"]))
    new = frame[kept & (places < 0)]
    waiting: dict[str, list[str]] = {}
    for key, path in zip(new["key"].tolist(), new["path"].tolist(), strict=True):
        waiting.setdefault(key, []).append(path)
    if waiting:
        found = _hash_all(folder, waiting, table, known, on_progress)
        known = pd.concat([known, _table_of(found)])
        places = pd.Index(known["key"]).get_indexer(pd.Index(frame["key"]))
    return _with_hashes(frame, known, np.where(kept, places, -1))


def _hash_all(
    folder: Path,
    waiting: dict[str, list[str]],
    table: Path,
    known: pd.DataFrame,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, _HashResult]:
    """What images look like by key; what lasts of it is added to the table."""
    import imagehash  # noqa: F401 - imported before the threads that need it

    found: dict[str, _HashResult] = {}
    budget = Budget(_FILE_BYTES_AT_ONCE)
    items = list(waiting.items())
    saved = time.monotonic()
    with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2)), thread_name_prefix="look") as pool:
        try:
            for start in range(0, len(items), _BATCH):
                batch = items[start : start + _BATCH]
                looks = pool.map(lambda item: _hash_one(folder, item[0], item[1], budget), batch)
                for done, ((key, _), look) in enumerate(zip(batch, looks, strict=True), start + 1):
                    found[key] = look
                    if on_progress is not None:
                        on_progress(done, len(items))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    _write_table(table, known, found)
                    saved = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            _write_table(table, known, found)
    return found


def _hash_one(folder: Path, key: str, paths: list[str], budget: Budget) -> _HashResult:
    """Look at the content `key`, at the first of its paths that still has it."""
    look = _HashResult(problem=CHANGED, lasting=False)
    for path in paths:
        try:
            with unexpected_as_unreadable(), budget.taking((folder / path).stat().st_size):
                data = (folder / path).read_bytes()
                if hashlib.sha256(data).hexdigest() == key:
                    return _HashResult(phash=_hash_image(data))
            look = _HashResult(problem=CHANGED, lasting=False)
        except UnreadableImage as error:
            look = _HashResult(problem=error.reason, lasting=error.lasting)
            if error.lasting:
                break
    return look


def _hash_image(data: bytes) -> str:
    """Return the hash of the image in `data`. Raises UnreadableImage naming what is wrong with it."""
    with open_image(data) as image:
        if image.format in ("JPEG", "MPO"):
            pixels = decode_jpeg_small(data, _SMALLEST_EDGE)
            if isinstance(pixels, str):
                raise UnreadableImage(pixels)
            if (
                pixels is not None and image.mode != "CMYK"
            ):  # whose inks it takes for the inverse of what they are
                small = Image.fromarray(pixels)
                small.info = image.info  # with its orientation
                return perceptual_hash(small)
            image.draft(None, (_SMALLEST_EDGE, _SMALLEST_EDGE))
        elif image.format == "PNG" and (reason := png_damage(data)):
            raise UnreadableImage(reason)
        with pixel_memory(image):
            decode(image)
            return perceptual_hash(_shrunk(image))


def perceptual_hash(image: Image.Image) -> str:
    """What a decoded image looks like, as `compute_hashes` writes it into `phash`."""
    import imagehash

    seen = to_eight_bits(upright(image))
    if min(seen.size) > _SMALLEST_EDGE:  # what could not be shrunk before it was of 8 bits
        seen = seen.reduce(min(seen.size) // _SMALLEST_EDGE)
    srgb = to_srgb(seen, image.info.get("icc_profile"))
    red, green, blue = np.moveaxis(
        np.asarray(srgb.resize((_GRID, _GRID), Image.Resampling.BOX)).astype(np.float64), 2, 0
    )
    # independent of brightness, but for what is nearly black
    colours = np.stack((red - green, blue - green)) / (red + green + blue + 192.0)
    return str(imagehash.phash(srgb)) + np.rint(colours * 200 + 128).astype(np.uint8).tobytes().hex()


def _shrunk(image: Image.Image) -> Image.Image:
    """A decoded image at a fraction of its size, where that can be had without converting it first."""
    factor = min(image.size) // _SMALLEST_EDGE
    plain = image.mode in ("LA", "RGBA", "CMYK") or (
        image.mode in ("L", "RGB") and not image.has_transparency_data
    )
    return image.reduce(factor) if plain and factor > 1 else image


def _with_hashes(frame: pd.DataFrame, known: pd.DataFrame, places: np.ndarray) -> pd.DataFrame:
    """`places`: where in `known` each row's look stands, or -1."""
    looked = frame.copy()
    looks = known.reset_index(drop=True).reindex(places).set_axis(frame.index).fillna("")
    looked["phash"] = looks["phash"]
    bad = looks["problem"] != ""
    looked.loc[bad, "status"] = "dropped"
    looked.loc[bad, "reason"] = looks["problem"][bad]
    return looked


def _table_of(found: dict[str, _HashResult]) -> pd.DataFrame:
    columns = {
        "key": list(found),
        "phash": [look.phash for look in found.values()],
        "problem": [look.problem for look in found.values()],
    }
    return pd.DataFrame(columns, dtype="str")


def _read_table(path: Path) -> pd.DataFrame:
    """What is known, a row per key; nothing when there is no table, or it is of another version or not whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        stored = pq.read_table(path)
    except (OSError, pa.ArrowInvalid):
        return _table_of({})
    if (stored.schema.metadata or {}).get(_VERSION_ENTRY) != _VERSION:
        return _table_of({})
    table: pd.DataFrame = stored.to_pandas()
    return table


def _write_table(path: Path, known: pd.DataFrame, found: dict[str, _HashResult]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lasting = {key: look for key, look in found.items() if look.lasting}
    table = pa.Table.from_pandas(pd.concat([known, _table_of(lasting)]), preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _VERSION_ENTRY: _VERSION})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
