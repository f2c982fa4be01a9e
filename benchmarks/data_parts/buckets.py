"""The crop plan of a million images: planning, digests, latent keys, and memory, in a process of its own."""

import hashlib
import io
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from assets.metadata import crop_plan_metadata
from benchmarks.measurements import Measurement, Options

IMAGES = 1_000_000
SECONDS = 10.0
BYTES = 2 * 2**30
BUCKETING = ("plan", "rows digest", "checks", "metadata with its image", "Parquet file")
REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {
    "square": {"crop_aspect": "square"},
    "preserve": {"crop_aspect": "preserve"},
    "random": {
        "crop_aspect": "random",
        "crop_aspect_buckets": [1.0, 0.67, 0.75, 1.33, 1.5],
        "max_upscale_threshold": 0.25,
    },
}


def measure(options: Options) -> list[Measurement]:
    """Return seconds and bytes for one million rows of realistic sizes, for three crop aspects."""
    images = 20_000 if options.quick else IMAGES
    measurements = []
    for name, settings in SETTINGS.items():
        output = subprocess.run(
            [sys.executable, "-m", "benchmarks.data_parts.buckets", str(images), json.dumps(settings)],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        seconds, peak, with_leaks = json.loads(output.splitlines()[-1])
        note = f"{images:,} images, crop_aspect {name}"
        bucketing = sum(seconds[name] for name in BUCKETING)
        measurements += [
            Measurement("buckets", what, value, "s", note=note) for what, value in seconds.items()
        ]
        measurements += [
            Measurement("buckets", "bucketing", bucketing, "s", "under 10 s", bucketing < SECONDS, f"{note}: {', '.join(BUCKETING)}"),
            Measurement("buckets", "peak memory", peak / 2**30, "GiB", "under 2 GiB", peak < BYTES, note),
            Measurement("buckets", "peak memory with the search", with_leaks / 2**30, "GiB", note=note),
        ]  # fmt: skip
    return measurements


def scan_of(images: int) -> pd.DataFrame:
    """Return a synthetic scan of so many images: half in sizes of cameras and phones, half of arbitrary size, as on the web."""
    random = np.random.default_rng(0)
    cameras = np.array([(3000, 4000), (4000, 6000), (1080, 1920), (3024, 4032), (2448, 3264), (1365, 2048)])
    height, width = cameras[random.integers(0, len(cameras), images)].T
    upright = random.random(images) < 0.3
    height, width = np.where(upright, width, height), np.where(upright, height, width)
    edge, aspect = np.exp(random.normal(6.9, 0.5, images)), np.exp(random.normal(0.1, 0.4, images))
    cut = random.random(images) < 0.5
    numbers = range(images)
    return pd.DataFrame(
        {
            "path": [f"part_{n % 1000:03d}/image_{n:09d}.jpg" for n in numbers],
            "key": [hashlib.sha256(b"%d" % n).hexdigest() for n in numbers],
            "height": np.where(cut, np.maximum(edge / np.sqrt(aspect), 64), height).astype(np.int64),
            "width": np.where(cut, np.maximum(edge * np.sqrt(aspect), 64), width).astype(np.int64),
            "captions": [[f"a photograph of the thing that has the number {n}, in colour"] for n in numbers],
            "phash": [
                hashlib.sha512(b"look %d" % n).hexdigest()[:80] for n in numbers
            ],  # 40 bytes, as compute_hashes fills them
            "status": "kept",
        }
    ).astype({"path": "str", "key": "str", "phash": "str", "status": "str"})


def _plan(images: int, settings: dict[str, Any]) -> None:
    """Plan in this process, and print ({name: seconds}, peak bytes, peak bytes with the search for leaks)."""
    from assets.checks.data_checks import check_buckets, check_held_out
    from sdxl_pipeline.cache.encode.cache_keys import latent_keys
    from sdxl_pipeline.config.schema.datasets import ImageDataset
    from sdxl_pipeline.data.buckets.crop_plan import plan_crops
    from sdxl_pipeline.data.buckets.holdout import choose_held_out
    from sdxl_pipeline.data.scan.dataset_fingerprint import dataset_digest, rows_digest

    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    scanned = scan_of(images)
    dataset = ImageDataset.model_validate(
        {"id": "bench", "instance_data_dir": "data", "resolution": 1024, "crop": True} | settings
    )
    timed("dataset digest", lambda: dataset_digest(scanned))
    held_out = timed("hold-out", lambda: choose_held_out(scanned, 0.02, ()))
    rows, dropped = timed("plan", lambda: plan_crops(dataset, scanned, 42, held_out, is_eval=False))
    timed("rows digest", lambda: rows_digest(rows))
    timed("checks", lambda: check_buckets(rows, dropped, scanned, 4))
    timed("metadata with its image", lambda: crop_plan_metadata(rows, dropped, 0, 4))
    timed("Parquet file", lambda: rows.to_parquet(io.BytesIO()))
    timed("latent keys", lambda: latent_keys(rows, "0" * 64, "bf16"))
    peak = _peak()
    timed("search for leaks", lambda: check_held_out(rows, scanned, Path("data")))
    print(json.dumps([seconds, peak, _peak()]))


def _peak() -> int:
    """Return the peak memory of this process in bytes; getrusage in a child may report its parent's."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS, which counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        * 1024
    )


if __name__ == "__main__":
    _plan(int(sys.argv[1]), json.loads(sys.argv[2]))
