"""Time from the launch of the train stage with warm caches to its first step, by part."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measurements import Measurement, Options
from benchmarks.train_parts.interleaved import REPOSITORY
from benchmarks.train_parts.prepared import prepared_run

# The train stage in its order of execution, with wall and CPU time at the end of each part, printed as JSON.
PROGRAM = """
import json, resource, sys, time
started = float(sys.argv[2])
marks = {}
def mark(name):
    used = resource.getrusage(resource.RUSAGE_SELF)
    marks[name] = (time.time() - started, used.ru_utime + used.ru_stime)
from sdxl_pipeline.runtime.specs import (TrainSpec)
from sdxl_pipeline.runtime.reporter import PlainReporter
from sdxl_pipeline.runtime.stage_runner import StopSignal
import sdxl_pipeline.stages.train
mark("Python and the stage's own modules")
import torch
mark("importing torch")
import sdxl_pipeline.training.trainer as loop
mark("importing diffusers, peft and others")
from pathlib import Path
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
spec = TrainSpec.model_validate_json(Path(sys.argv[1]).read_text())
Path(spec.run_dir).mkdir(parents=True, exist_ok=True)
class First(PlainReporter):
    def progress(self, task, done, total, unit=""):
        if task == "train" and done == 1:
            mark("reading the first batch, and the first step")
            raise SystemExit
trainer = loop.Trainer(spec, run_identity(spec), First(sys.stderr), StopSignal())
mark("loading the model, planning the order")
try:
    trainer.train()
finally:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"marks": marks, "peak": peak * (1 if sys.platform == "darwin" else 1024)}), flush=True)
"""


def measure(options: Options) -> list[Measurement]:
    """Return median wall and CPU seconds from launch to the first step, by part."""
    root = Path(options.workdir) / "launch"
    shutil.rmtree(root, ignore_errors=True)
    spec = prepared_run(root, 3, 128, 8)
    path = root / "spec.json"
    path.write_text(spec.model_dump_json())
    launches = [
        _launch(path, Path(spec.run_dir)) for _ in range(1 if options.quick else max(5, options.repeats))
    ]
    measurements, wall_before, cpu_before = [], 0.0, 0.0
    for name in launches[0]["marks"]:
        wall, cpu = (
            statistics.median(launch["marks"][name][clock] for launch in launches) for clock in (0, 1)
        )
        measurements.append(
            Measurement("launch", name, wall - wall_before, "s", note=f"{cpu - cpu_before:.2f} s of CPU")
        )
        wall_before, cpu_before = wall, cpu
    peak = statistics.median(launch["peak"] for launch in launches)
    note = f"warm caches, train stage alone, {len(launches)} launches, {cpu_before:.2f} s of CPU"
    return [
        *measurements,
        Measurement("launch", "launch to first step", wall_before, "s", note=note),
        Measurement("launch", "peak memory until then", peak / 1e9, "GB"),
    ]


def _launch(spec: Path, run_dir: Path) -> dict:
    shutil.rmtree(run_dir, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(spec), repr(time.time())],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found
