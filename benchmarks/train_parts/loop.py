"""Steps per second of the Trainer against a bare loop and diffusers' example loop, in alternation on one machine."""

import shutil
import statistics
from pathlib import Path

from benchmarks.measurements import Measurement, Options
from benchmarks.train_parts.interleaved import ratio, take_turns
from benchmarks.train_parts.prepared import BATCH_SIZE, prepared_run

RESOLUTION = 128
TARGET = 0.97
ROUNDS, STEPS, WARM_UP = 21, 20, 10
CONTENDERS = ("trainer", "bare", "example")


def measure(options: Options) -> list[Measurement]:
    """Return ratios of steps per second on the bundled model, batch 4, float32, one thread; peak memory of each process."""
    rounds, steps, warm_up = (1, 2, 1) if options.quick else (max(ROUNDS, options.repeats), STEPS, WARM_UP)
    root = Path(options.workdir) / "loop"
    shutil.rmtree(root, ignore_errors=True)
    total = warm_up + rounds * steps + 1  # one more, so that the run does not end
    spec = prepared_run(root, total, RESOLUTION, 8 if options.quick else 64)
    path = root / "spec.json"
    path.write_text(spec.model_dump_json())
    commands = {name: ("-m", "benchmarks.train_parts.contender", name, str(path)) for name in CONTENDERS}
    timings = take_turns(commands, rounds, steps, warm_up)
    note = f"batch {BATCH_SIZE}, {RESOLUTION} px, {rounds} rounds of {steps} steps"
    trainer, bare, example = (timings[name] for name in CONTENDERS)
    to_bare, to_example = ratio(trainer.seconds, bare.seconds), ratio(trainer.seconds, example.seconds)
    speeds = [
        Measurement("loop", name, steps / statistics.median(timings[name].seconds), "steps/s", note=note)
        for name in CONTENDERS
    ]
    return [
        *speeds,
        Measurement(
            "loop",
            "trainer, of the bare loop's speed",
            to_bare,
            "",
            f"at least {TARGET}",
            to_bare >= TARGET,
            "bare: noising, UNet, loss, backward, clipping, AdamW; batches in memory",
        ),
        Measurement(
            "loop",
            "the same, by CPU seconds of all threads",
            ratio(trainer.cpu_seconds, bare.cpu_seconds),
            "",
            note="more stable on a busy machine; includes the prefetching thread",
        ),
        Measurement(
            "loop",
            "trainer, of the example's speed",
            to_example,
            "",
            "above 1",
            to_example > 1,
            "diffusers' example for LoRAs: VAE and text encoders in the loop",
        ),
        Measurement("loop", "trainer, peak memory", trainer.peak / 1e9, "GB"),
        Measurement("loop", "example, peak memory", example.peak / 1e9, "GB"),
    ]
