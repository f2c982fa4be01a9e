"""Scanning: 10,000 JPEGs of about 1 MB with a caption file each, from warm page cache, against sha256 of the same bytes.

This measures the CPU's part: on a slow disk, the disk limits the scan.
"""

import hashlib
import io
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from benchmarks.measurements import Measurement, Options
from benchmarks.photographs import pieces
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset

REFERENCE_IMAGES_PER_SECOND = 556
"""SimpleTuner's discovery of 339 images, which decodes each image."""
IMAGE_BYTES = 1_000_000
_PHOTOGRAPHS = 24
_QUALITIES = (99, 98, 97, 95, 92, 88, 80)


def measure(options: Options) -> list[Measurement]:
    """Return seconds and rates of the first scan, of a re-scan of the unchanged folder, and of one with `verify`."""
    count, repeats = (60, 2) if options.quick else (10_000, min(options.repeats, 3))
    with _images(Path(options.workdir), count) as folder:
        dataset = ImageDataset(
            id="photos", instance_data_dir=folder, resolution=1024, caption_strategy="textfile"
        )
        table = folder.parent / "scan.parquet"
        megabytes = sum(path.stat().st_size for path in folder.glob("*.jpg")) / 1e6

        def scan(verify: bool = False) -> None:
            scanned = scan_dataset(dataset, folder, recorded=table, verify=verify)
            if (scanned["status"] == "kept").sum() != count:
                raise RuntimeError("the scan lost images")

        def first() -> None:
            table.unlink(missing_ok=True)
            scan()

        limit, first_seconds = _against_sha256(folder, first, repeats)
        again_seconds = _median_seconds(scan, repeats * 3)
        verify_seconds = _median_seconds(lambda: scan(verify=True), repeats)
    rate, ratio = count / first_seconds, first_seconds / again_seconds
    target = f"more than {REFERENCE_IMAGES_PER_SECOND} (SimpleTuner)"
    note = f"{count:,} JPEGs, {megabytes:,.0f} MB, page cache warm"
    return [
        Measurement("scan", "sha256, one process per core", megabytes / limit, "MB/s", note=note),
        Measurement("scan", "first scan", rate, "images/s", target, rate > REFERENCE_IMAGES_PER_SECOND),
        Measurement("scan", "first scan", megabytes / first_seconds, "MB/s"),
        Measurement(
            "scan",
            "first scan against sha256",
            limit / first_seconds,
            "of its speed",
            "as close to 1 as possible",
        ),
        Measurement(
            "scan", "re-scan, nothing changed", again_seconds, "s", note=f"{2 * count:,} files compared"
        ),
        Measurement("scan", "re-scan against first scan", ratio, "times faster", "at least 20", ratio >= 20),
        Measurement("scan", "re-scan with verify", verify_seconds, "s"),
    ]


@contextmanager
def _images(workdir: Path, count: int) -> Iterator[Path]:
    """Create a folder of images and captions, which is deleted afterwards. Raise RuntimeError if the disk is too small."""
    needed = count * IMAGE_BYTES * 1.1
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise RuntimeError(
            f"{workdir} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed; set --workdir"
        )
    folder = workdir / "scan" / "images"
    folder.mkdir(parents=True)
    try:
        sources = [_jpeg_of_a_megabyte(photograph) for photograph, _ in pieces(min(_PHOTOGRAPHS, count))]
        an_hour_ago = (
            time.time() - 3600
        )  # a re-scan does not trust files that were changed just before the scan
        for number in range(count):
            image, caption = folder / f"{number:05d}.jpg", folder / f"{number:05d}.txt"
            # bytes after the end of a JPEG change its digest only
            image.write_bytes(sources[number % len(sources)] + number.to_bytes(8, "big"))
            caption.write_text(f"a photograph, the {number}th of many, with a caption of usual length\n")
            for path in (image, caption):
                os.utime(path, (an_hour_ago, an_hour_ago))
        yield folder
    finally:
        shutil.rmtree(folder.parent)


def _jpeg_of_a_megabyte(image: Image.Image) -> bytes:
    scale = 2400 / max(image.size)
    large = image.resize((round(image.width * scale), round(image.height * scale)))
    return min(
        (_jpeg(large, quality) for quality in _QUALITIES), key=lambda data: abs(len(data) - IMAGE_BYTES)
    )


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _against_sha256(folder: Path, work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Return (seconds to hash every image with one process per core, the lower bound of any scan; seconds of `work`).

    They alternate, so that a change of the machine's speed affects both.
    """
    paths = sorted(str(path) for path in folder.glob("*.jpg"))
    cores = len(os.sched_getaffinity(0))
    shares = [paths[core::cores] for core in range(cores)]
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(_hash_all, shares, chunksize=1)  # starts the processes and fills the page cache
        pairs = [
            (_seconds(lambda: pool.map(_hash_all, shares, chunksize=1)), _seconds(work))
            for _ in range(repeats)
        ]
    limits, seconds = zip(*pairs, strict=True)
    return statistics.median(limits), statistics.median(seconds)


def _hash_all(paths: list[str]) -> int:
    return sum(len(hashlib.sha256(Path(path).read_bytes()).digest()) for path in paths)


def _median_seconds(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
