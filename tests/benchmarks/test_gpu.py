"""Tests of the GPU benchmark on small shapes, with only torch, diffusers, transformers, peft and accelerate installed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Other packages of this project, which such a machine may lack.
ABSENT = "pydantic dagster dagster_pipes pandas pyarrow matplotlib rich simplejpeg imagehash skimage"

PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT.split()!r}))
import runpy
sys.argv = ["benchmarks.train", "--gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.train", run_name="__main__")
"""


@pytest.mark.slow
def test_gpu_benchmark_without_other_packages_measures_every_variant(tmp_path):
    options = "--device cpu --tiny --resolution 64 --batches 1 --rounds 1 --steps 1 --compiler eager"
    kernels = ["--kernels", "_native_math", "_native_cudnn"]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            *options.split(),
            *kernels,
            "--json",
            str(tmp_path / "measurements.json"),
        ],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measurements = {
        (each["name"], each["unit"]): each
        for each in json.loads((tmp_path / "measurements.json").read_text())
    }
    for name in (
        "checkpointing",
        "no checkpointing",
        "compiled blocks (eager), no checkpointing",
    ):
        assert measurements[f"{name}, batch 1", "images/s"]["value"] > 0
    assert measurements["attention _native_math, batch 1", "steps/s"]["value"] > 0
    (absent,) = [each for (name, _), each in measurements.items() if "_native_cudnn" in name]
    assert math.isnan(absent["value"])
    assert absent["note"]  # the reason
    for name in ("checkpointing", "no checkpointing"):
        assert measurements[f"{name}, cached loop, of the example's speed, batch 1", ""]["value"] > 0
    assert measurements["model FLOPs of an image", "TFLOP"]["value"] > 0
