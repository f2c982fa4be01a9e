"""Holds that the GPU's benchmark runs where only torch, diffusers, transformers, peft and accelerate are installed, on small shapes."""

import json
import math
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

# What this project has besides, and such a machine may lack.
ABSENT = "pydantic dagster dagster_pipes pandas pyarrow matplotlib rich simplejpeg imagehash skimage"

PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT.split()!r}))
import runpy
sys.argv = ["benchmarks.train", "--gpu", *sys.argv[1:]]
runpy.run_module("benchmarks.train", run_name="__main__")
"""


def test_every_variant_is_measured_without_this_projects_other_packages(tmp_path):
    options = "--device cpu --tiny --resolution 64 --batches 1 --rounds 1 --steps 1 --compiler eager"
    kernels = ["--kernels", "_native_math", "_native_cudnn"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *options.split(), *kernels, "--json", str(tmp_path / "figures.json")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = {
        (figure["name"], figure["unit"]): figure
        for figure in json.loads((tmp_path / "figures.json").read_text())
    }
    for name in (
        "checkpointing",
        "no checkpointing",
        "compiled blocks (eager), no checkpointing",
    ):
        assert figures[f"{name}, batch 1", "images/s"]["value"] > 0
    assert figures["attention _native_math, batch 1", "steps/s"]["value"] > 0
    (absent,) = [figure for (name, _), figure in figures.items() if "_native_cudnn" in name]
    assert math.isnan(absent["value"])
    assert absent["note"]  # says why
    for name in ("checkpointing", "no checkpointing"):
        assert figures[f"{name}, cached loop, of the example's speed, batch 1", ""]["value"] > 0
    assert figures["model FLOPs of an image", "TFLOP"]["value"] > 0
