"""Integrity check and perceptual hash of every image, computed once before anything is encoded.

Results are stored in a table by image content, so each image is decoded once, independent of its name.

Pillow raises for missing data and little else: a JPEG with a run of zeros, as after a disk failure or an interrupted copy, silently
becomes an image that is grey or shifted from there on. libjpeg warns about it, and `simplejpeg` exposes that warning. A PNG has checksums
of its pixel data, which Pillow does not verify. The other formats have no checksums: only errors of their decoders are detected.
"""

import hashlib
import os
import re
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.data.decoding.image_decoding import (
    CORRUPT,
    TRUNCATED,
    UnreadableImage,
    decode,
    open_image,
    unexpected_as_unreadable,
    upright,
)
from sdxl_pipeline.data.decoding.memory_budget import MemoryBudget, pixel_memory
from sdxl_pipeline.data.decoding.pixels import to_8_bit, to_srgb
from sdxl_pipeline.files.atomic_files import atomic_path

_PADDING_BYTES = 16
# libjpeg's warnings (jerror.h, JWRN_*) about coded data that no encoder writes
_JPEG_CORRUPTION = re.compile(
    "premature end of data segment|bad Huffman code|bad arithmetic code|instead of RST|"
    "(?P<truncated>Premature end of JPEG file)|(?P<bytes>[0-9]+) extraneous bytes before marker"
)


def decode_jpeg_small(data: bytes, smallest_edge: int) -> np.ndarray | str | None:
    """Return a JPEG's pixels as uint8 (H, W, 3) in its own RGB, at the smallest decodable scale with both edges >= `smallest_edge`.

    An image with a smaller edge is decoded at full scale. All coded data is read. A returned string is the reason why the image cannot
    be used; None means that libjpeg-turbo cannot decode it, which another decoder may.

    Nearly all runs of zeros are detected, nine of ten swapped sectors, and one of three flipped bits: decoding often resynchronizes, and
    then only some blocks are wrong. Some cameras and programs leave extra bytes at the end of valid images: up to 16 count as padding.
    Other warnings of libjpeg do not concern the pixels.
    """
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        size = {"min_height": min(smallest_edge, height), "min_width": min(smallest_edge, width)}
    except ValueError:
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True, **size)
    except ValueError as error:
        warning = _JPEG_CORRUPTION.search(str(error))
        if warning is not None and int(warning["bytes"] or _PADDING_BYTES + 1) > _PADDING_BYTES:
            return TRUNCATED if warning["truncated"] else CORRUPT
    try:
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **size)
    except ValueError:
        return None


def png_corruption(data: bytes) -> str:
    """Return the reason if a pixel chunk of a PNG does not match its checksum (PNG, third edition, 5.3); else ""."""
    view = memoryview(data)
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        kind = data[position + 4 : position + 8]
        if kind == b"IEND" or end + 4 > len(data):
            break
        if kind == b"IDAT" and zlib.crc32(view[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            return CORRUPT
        position = end + 4
    return ""


CHANGED_SINCE_SCAN = "changed while the dataset was scanned; materialize the dataset again"
SAVE_SECONDS = 30.0
"""Interval between writes of the table, and so the most work that a kill loses."""

_VERSION_ENTRY, _VERSION = b"looks_version", b"2"  # increase it when the results for an image change
_BATCH = 1024
_MIN_EDGE = 128
_GRID = 4  # columns and rows of the parts whose mean colours are part of the hash
_MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _HashResult:
    phash: str = ""
    problem: str = ""
    permanent: bool = True  # False for a temporary problem of the file rather than of its content


def compute_hashes(
    folder: Path, frame: pd.DataFrame, table: Path, on_progress: Callable[[int, int], None] | None = None
) -> pd.DataFrame:
    """Return a scan's frame with `phash` set for its kept images; images with corrupt pixels are dropped with a reason.

    `phash` is 80 hex digits. The first 16 are the 64-bit perceptual hash of the upright image, transparency over white: the signs of
    its lowest frequencies (imagehash.phash), independent of colour. The others are its colours: the excess of red over green in each of
    4 x 4 parts, then that of blue over green, a byte each. A JPEG is decoded at reduced size, but all of its coded data is read.

    `table` is the Parquet file (key, phash, problem) of earlier results, whose images are not read again. It is replaced atomically
    every half minute. A file that is missing or changed since the scan is dropped, without an entry in the table.
    `on_progress(done, total)` counts the images to hash. Only a few images are in memory at a time.
    """
    known = _read_table(table)
    kept = (frame["status"] == "kept").to_numpy()
    positions = pd.Index(known["key"]).get_indexer(pd.Index(frame["key"]))
    new = frame[kept & (positions < 0)]
    pending: dict[str, list[str]] = {}
    for key, path in zip(new["key"].tolist(), new["path"].tolist(), strict=True):
        pending.setdefault(key, []).append(path)
    if pending:
        results = _hash_all(folder, pending, table, known, on_progress)
        known = pd.concat([known, _table_of(results)])
        positions = pd.Index(known["key"]).get_indexer(pd.Index(frame["key"]))
    return _with_hashes(frame, known, np.where(kept, positions, -1))


def _hash_all(
    folder: Path,
    pending: dict[str, list[str]],
    table: Path,
    known: pd.DataFrame,
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, _HashResult]:
    """Return the results by key; permanent ones are added to the table."""
    import imagehash  # noqa: F401 - import it before the threads do

    results: dict[str, _HashResult] = {}
    budget = MemoryBudget(_MAX_FILE_BYTES)
    items = list(pending.items())
    saved = time.monotonic()
    with ThreadPoolExecutor(min(8, max(2, os.cpu_count() or 2)), thread_name_prefix="phash") as pool:
        try:
            for start in range(0, len(items), _BATCH):
                batch = items[start : start + _BATCH]
                hash_results = pool.map(lambda item: _hash_one(folder, item[0], item[1], budget), batch)
                for done, ((key, _), result) in enumerate(zip(batch, hash_results, strict=True), start + 1):
                    results[key] = result
                    if on_progress is not None:
                        on_progress(done, len(items))
                if time.monotonic() - saved >= SAVE_SECONDS:
                    _write_table(table, known, results)
                    saved = time.monotonic()
        finally:
            pool.shutdown(cancel_futures=True)
            _write_table(table, known, results)
    return results


def _hash_one(folder: Path, key: str, paths: list[str], budget: MemoryBudget) -> _HashResult:
    """Return the result for the content `key`, read from the first of its paths that still has it."""
    result = _HashResult(problem=CHANGED_SINCE_SCAN, permanent=False)
    for path in paths:
        try:
            with unexpected_as_unreadable(), budget.reserve((folder / path).stat().st_size):
                data = (folder / path).read_bytes()
                if hashlib.sha256(data).hexdigest() == key:
                    return _HashResult(phash=_hash_image(data))
            result = _HashResult(problem=CHANGED_SINCE_SCAN, permanent=False)
        except UnreadableImage as error:
            result = _HashResult(problem=error.reason, permanent=error.permanent)
            if error.permanent:
                break
    return result


def _hash_image(data: bytes) -> str:
    """Return the hash of the image in `data`. Raise UnreadableImage if it is corrupt or cannot be decoded."""
    with open_image(data) as image:
        if image.format in ("JPEG", "MPO"):
            pixels = decode_jpeg_small(data, _MIN_EDGE)
            if isinstance(pixels, str):
                raise UnreadableImage(pixels)
            if pixels is not None and image.mode != "CMYK":  # CMYK would be inverted
                small = Image.fromarray(pixels)
                small.info = image.info  # has the orientation
                return perceptual_hash(small)
            image.draft(None, (_MIN_EDGE, _MIN_EDGE))
        elif image.format == "PNG" and (reason := png_corruption(data)):
            raise UnreadableImage(reason)
        with pixel_memory(image):
            decode(image)
            return perceptual_hash(_shrunk(image))


def perceptual_hash(image: Image.Image) -> str:
    """Return the hash of a decoded image in the format of `phash` (see `compute_hashes`)."""
    import imagehash

    flat = to_8_bit(upright(image))
    if min(flat.size) > _MIN_EDGE:  # modes that can be reduced only in 8 bits
        flat = flat.reduce(min(flat.size) // _MIN_EDGE)
    srgb = to_srgb(flat, image.info.get("icc_profile"))
    red, green, blue = np.moveaxis(
        np.asarray(srgb.resize((_GRID, _GRID), Image.Resampling.BOX)).astype(np.float64), 2, 0
    )
    # independent of brightness except for nearly black colours
    colours = np.stack((red - green, blue - green)) / (red + green + blue + 192.0)
    return str(imagehash.phash(srgb)) + np.rint(colours * 200 + 128).astype(np.uint8).tobytes().hex()


def _shrunk(image: Image.Image) -> Image.Image:
    """Return a decoded image at reduced size if its mode allows that without conversion, else unchanged."""
    factor = min(image.size) // _MIN_EDGE
    plain = image.mode in ("LA", "RGBA", "CMYK") or (
        image.mode in ("L", "RGB") and not image.has_transparency_data
    )
    return image.reduce(factor) if plain and factor > 1 else image


def _with_hashes(frame: pd.DataFrame, known: pd.DataFrame, positions: np.ndarray) -> pd.DataFrame:
    """Return `frame` with the results; `positions` are those of each row's result in `known`, -1 for none."""
    hashed = frame.copy()
    results = known.reset_index(drop=True).reindex(positions).set_axis(frame.index).fillna("")
    hashed["phash"] = results["phash"]
    is_unreadable = results["problem"] != ""
    hashed.loc[is_unreadable, "status"] = "dropped"
    hashed.loc[is_unreadable, "reason"] = results["problem"][is_unreadable]
    return hashed


def _table_of(results: dict[str, _HashResult]) -> pd.DataFrame:
    columns = {
        "key": list(results),
        "phash": [result.phash for result in results.values()],
        "problem": [result.problem for result in results.values()],
    }
    return pd.DataFrame(columns, dtype="str")


def _read_table(path: Path) -> pd.DataFrame:
    """Return the earlier results, a row per key; empty if the table is missing, incomplete or of another version."""
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


def _write_table(path: Path, known: pd.DataFrame, results: dict[str, _HashResult]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    permanent = {key: result for key, result in results.items() if result.permanent}
    table = pa.Table.from_pandas(pd.concat([known, _table_of(permanent)]), preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _VERSION_ENTRY: _VERSION})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
