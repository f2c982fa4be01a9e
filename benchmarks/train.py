"""Benchmarks of the trainer: against a bare loop and diffusers' example loop, and from launch to the first step.

    OMP_NUM_THREADS=1 python -m benchmarks.train [loop launch] [--quick] [--json FILE]
    python -m benchmarks.train --gpu

Prints a table of all measurements with their targets; docs/performance.md has the results of one machine. Needs the `dev` extra.
`--gpu` measures SDXL-base's architecture with random weights instead, and needs only torch, diffusers, transformers, peft and accelerate;
`python -m benchmarks.train --gpu --help` lists its options.
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.measurements import Measurement, Options, as_json, show

PARTS = ("loop", "launch")


def main() -> None:
    """Run the given parts, by default all."""
    if "--gpu" in sys.argv:
        from benchmarks.train_parts import gpu

        gpu.main([argument for argument in sys.argv[1:] if argument != "--gpu"])
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all")
    parser.add_argument("--gpu", action="store_true", help="SDXL-base's architecture on a GPU, and only that")
    parser.add_argument(
        "--quick", action="store_true", help="little work: tests that it runs; the values mean nothing"
    )
    parser.add_argument("--workdir", type=Path, help="folder for caches; default: a temporary one")
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="sdxl-benchmark-") as temporary:
        options = Options(
            workdir=str((arguments.workdir or Path(temporary)).resolve()), quick=arguments.quick
        )
        measurements: list[Measurement] = []
        for part in arguments.parts or PARTS:
            print(f"measuring {part} ...", flush=True)
            measurements += importlib.import_module(f"benchmarks.train_parts.{part}").measure(options)
    show(measurements)
    if arguments.json:
        arguments.json.write_text(as_json(measurements) + "\n")


if __name__ == "__main__":
    main()
