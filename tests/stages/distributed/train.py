"""The sleepy stage under a module name for which the launcher uses torchrun."""

from sdxl_pipeline.runtime.stage_runner import run_stage
from tests.stages.sleepy_stage import SleepySpec, main

if __name__ == "__main__":
    run_stage(SleepySpec, main)
