"""Encoding latents through the stage, against the bare VAE on crops in memory; peak memory."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.measurements import Measurement, Options
from benchmarks.photographs import write_dataset
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE_IMAGES_PER_SECOND = 31.0
BUSY = 0.9
IMAGES = 339


def measure(options: Options) -> list[Measurement]:
    """Return images/s, the VAE's utilization and the ratio to the bare VAE at 256 px; peak memory for N and 4 N images.

    Each repeat is a process of its own, which encodes the dataset into a new store and then runs the bare VAE.
    """
    root = Path(options.workdir) / "latents"
    count = 24 if options.quick else IMAGES
    spec = _spec(root, count)
    runs = [_in_a_process(spec, root / f"store-{number}", bare=True) for number in range(options.repeats)]
    images_per_second, busy, bare = (
        statistics.median(run[name] for run in runs) for name in ("images_per_second", "vae_busy", "bare")
    )
    ratio = statistics.median(run["images_per_second"] / run["bare"] for run in runs)
    small = _in_a_process(spec, root / "store-small", bare=False)["peak"]
    large = _in_a_process(_spec(root, 4 * count), root / "store-large", bare=False)["peak"]
    part, note = "latents", f"{count} images, 256 px, one thread, median of {options.repeats}"
    return [
        Measurement(
            part, "images encoded", images_per_second, "/s",
            f"above {REFERENCE_IMAGES_PER_SECOND:g}", images_per_second > REFERENCE_IMAGES_PER_SECOND, note,
        ),
        Measurement(part, "bare VAE, crops in memory", bare, "/s", note="the same process, right after"),
        Measurement(part, "encoding / bare VAE", ratio, "", f"at least {BUSY}", ratio >= BUSY),
        Measurement(part, "VAE busy", busy, "of the time", f"at least {BUSY}", busy >= BUSY),
        Measurement(part, f"peak memory, {count} images", small / 1e9, "GB"),
        Measurement(
            part, f"peak memory, {4 * count} images", large / 1e9, "GB",
            "at most 5 % more", large <= 1.05 * small,
        ),
    ]  # fmt: skip


def _spec(root: Path, count: int) -> Path:
    """Write a spec of the stage for a dataset of so many real images, and return its path."""
    data = root / f"data-{count}"
    write_dataset(data, count)
    dataset = ImageDataset(
        id="photos", instance_data_dir=data, caption_strategy="textfile", resolution=256, resolution_type="pixel_area"
    )  # fmt: skip
    rows, _ = plan_crops(dataset, scan_dataset(dataset, data), seed=0, held_out=(), is_eval=False)
    rows.to_parquet(root / f"rows-{count}.parquet")
    spec = EncodeLatentsSpec(
        base_model=resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), root),
        hardware=PRESETS["cpu"].model_copy(update={"cpu_threads": 1}),
        data_dir=str(data),
        rows_path=str(root / f"rows-{count}.parquet"),
        store_root="",
        entries_path="",
        sample_path="",
    )
    path = root / f"spec-{count}.json"
    path.write_text(spec.model_dump_json())
    return path


def _in_a_process(spec: Path, store: Path, bare: bool) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_parts.latents", str(spec), str(store), *(["bare"] if bare else [])],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _encode(spec_path: Path, root: Path, bare: bool) -> dict[str, float]:
    import torch

    from sdxl_pipeline.runtime.reporter import Reporter
    from sdxl_pipeline.runtime.stage_runner import StopSignal
    from sdxl_pipeline.stages.encode_latents import main
    from sdxl_pipeline.stages.train import peak_memory_bytes

    torch.set_num_threads(1)
    spec = EncodeLatentsSpec.model_validate_json(spec_path.read_text()).model_copy(
        update={
            "store_root": str(root),
            "entries_path": str(root / "entries.parquet"),
            "sample_path": str(root / "sample.png"),
        }
    )
    cache = main(spec, Reporter(), StopSignal())
    assert cache is not None
    assert cache.images_per_second is not None
    assert cache.vae_busy is not None
    assert not cache.failed
    peak = peak_memory_bytes("cpu")
    return {
        "images_per_second": cache.images_per_second,
        "vae_busy": cache.vae_busy,
        "peak": peak,
        "bare": _bare_vae(spec) if bare else 0.0,
    }


def _bare_vae(spec: EncodeLatentsSpec) -> float:
    """Return images/s of the same VAE on the same batches, decoded in advance: nothing is loaded, copied or stored meanwhile."""
    from sdxl_pipeline.cache.encode.cache_keys import latent_keys
    from sdxl_pipeline.cache.encode.crop_batches import crop_batches, read_crops
    from sdxl_pipeline.cache.encode.encoders import load_latent_encoder
    from sdxl_pipeline.models.vae import encode_moments, pixels_from_crops

    crops = pd.read_parquet(spec.rows_path)
    crops["latent_key"] = latent_keys(crops, spec.base_model.vae_digest, spec.hardware.vae_dtype)
    vae = load_latent_encoder(spec.base_model, spec.hardware)
    batches = [
        pixels_from_crops(
            [
                read_crops(Path(spec.data_dir) / row.path, row.key, [row])[0]
                for row in crops.iloc[rows].itertuples(index=False)
            ]
        )
        for rows in crop_batches(crops, np.ones(len(crops), bool), spec.hardware.vae_batch_size)
    ]
    started = time.perf_counter()
    for pixels in batches:
        encode_moments(vae, pixels)
    return len(crops) / (time.perf_counter() - started)


if __name__ == "__main__":
    print(json.dumps(_encode(Path(sys.argv[1]), Path(sys.argv[2]), "bare" in sys.argv[3:])))
