"""Benchmarks of the data stages: scanning, bucketing, encoding, the store, and the time from launch to the first step.

    OMP_NUM_THREADS=1 python -m benchmarks.data [scan buckets latents text store end_to_end] [--quick] [--json FILE]

Prints a table of all measurements with their targets; docs/performance.md has the results of one machine. Needs the `dev` extra,
about 12 GB of disk for `scan`, and a machine without other load.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from benchmarks.measurements import Measurement, Options, as_json, show

PARTS = ("scan", "buckets", "latents", "text", "store", "end_to_end")


def main() -> None:
    """Run the given parts, by default all."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all")
    parser.add_argument(
        "--quick", action="store_true", help="little work: tests that it runs; the values mean nothing"
    )
    parser.add_argument("--workdir", type=Path, help="folder for images and caches; default: a temporary one")
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
            measurements += importlib.import_module(f"benchmarks.data_parts.{part}").measure(options)
    show(measurements)
    if arguments.json:
        arguments.json.write_text(as_json(measurements) + "\n")


if __name__ == "__main__":
    main()
