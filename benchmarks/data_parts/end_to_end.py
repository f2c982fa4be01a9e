"""From launch to the first training step, with cold and then warm caches, through the command line."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.measurements import Measurement, Options
from benchmarks.photographs import write_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.1
REFERENCE_SECONDS = 30.9
REFERENCE_BYTES = 1.8e9
CONFIG = {
    "model_type": "lora",
    "model_family": "sdxl",
    "pretrained_model_name_or_path": "bundled:tiny-sdxl",
    "train_batch_size": 4,
    "max_train_steps": 1,
    "lora_rank": 8,
    "validation_disable": True,
    "eval_loss_disable": True,
}
DATASET = {
    "id": "photos",
    "instance_data_dir": "data",
    "caption_strategy": "textfile",
    "resolution": 256,
    "resolution_type": "pixel_area",
    "crop": False,
    "find_near_duplicates": False,  # the reference has no such search
}


def measure(options: Options) -> list[Measurement]:
    """Return seconds to the first step on 339 images at 256 px, cold and warm, and the memory of the largest process."""
    root = Path(options.workdir) / "end_to_end"
    shutil.rmtree(root / "storage", ignore_errors=True)
    project = root / "projects" / "bench"
    shutil.rmtree(project / "output", ignore_errors=True)
    count = 24 if options.quick else 339
    write_dataset(project / "data", count)
    (project / "config.json").write_text(json.dumps(CONFIG))
    (project / "multidatabackend.json").write_text(json.dumps([DATASET]))
    cold, peak = _until_first_step(root, project)
    shutil.rmtree(project / "output")  # keeps the caches, deletes the run
    warm, _ = _until_first_step(root, project)
    note = f"{count} images, complete graph by `dagster asset materialize`"
    return [
        Measurement(
            "end to end",
            "launch to first step, cold caches",
            cold,
            "s",
            f"below {REFERENCE_SECONDS}",
            cold < REFERENCE_SECONDS,
            note,
        ),
        Measurement(
            "end to end",
            "launch to first step, warm caches",
            warm,
            "s",
            note="the run itself is trained again",
        ),
        Measurement(
            "end to end",
            "largest process",
            peak / 1e9,
            "GB",
            f"below {REFERENCE_BYTES / 1e9:g}",
            peak < REFERENCE_BYTES,
        ),
    ]


def _until_first_step(root: Path, project: Path) -> tuple[float, int]:
    """Return (seconds from launch to the first line of metrics.jsonl, peak memory of the largest process in bytes)."""
    environment = {
        **os.environ,
        "SDXL_PIPELINE_PROJECTS": str(project.parent),
        "SDXL_PIPELINE_STORAGE": str(root / "storage"),
        "SDXL_HARDWARE": "cpu",
        "DAGSTER_HOME": str(_dagster_home(root)),
    }
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", "sdxl_pipeline.definitions"]
    started = time.monotonic()
    with (root / "graph.log").open("wb") as log:
        graph = subprocess.Popen(
            [*command, "--select", "+key:bench/lora"], env=environment, cwd=REPOSITORY, stdout=log, stderr=log
        )
        peak = 0
        try:
            while graph.poll() is None and not _has_first_step(project):
                peak = max(peak, _largest_process(graph.pid))
                time.sleep(POLL_SECONDS)
            seconds = time.monotonic() - started
            graph.wait(timeout=120)
        finally:
            graph.kill()
    if not _has_first_step(project):
        raise RuntimeError(
            f"the graph ended without a training step; its log: {(root / 'graph.log').read_text()[-2000:]}"
        )
    return seconds, peak


def _dagster_home(root: Path) -> Path:
    home = root / "dagster"
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(REPOSITORY / "dagster.yaml", home / "dagster.yaml")
    return home


def _has_first_step(project: Path) -> bool:
    return any(path.stat().st_size for path in project.glob("output/lora/*/metrics.jsonl"))


def _largest_process(pid: int) -> int:
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    sizes = [0]
    for process in processes:
        try:
            sizes.append(process.memory_info().rss)
        except psutil.Error:
            continue
    return max(sizes)
