"""How fast the data plane is: scanning, bucketing, encoding, the store, and the way from launch to the first step.

    OMP_NUM_THREADS=1 python -m benchmarks.data [scan buckets latents text store end_to_end] [--quick] [--json FILE]

Prints a table of every figure with what it is held against; docs/performance.md keeps the figures of one machine. Needs the `dev` extra,
about 12 GB of disk for `scan`, and a machine with nothing else to do.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from benchmarks.figures import Measurement, Options, as_json, show

PARTS = ("scan", "buckets", "latents", "text", "store", "end_to_end")


def main() -> None:
    """Measure the parts asked for, all of them by default."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}; none: all")
    parser.add_argument(
        "--quick", action="store_true", help="little work: shows that it runs, measures nothing"
    )
    parser.add_argument(
        "--workdir", type=Path, help="folder for images and caches; not given: one that is deleted"
    )
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="sdxl-benchmark-") as temporary:
        options = Options(
            workdir=str((arguments.workdir or Path(temporary)).resolve()), quick=arguments.quick
        )
        figures: list[Measurement] = []
        for part in arguments.parts or PARTS:
            print(f"measuring {part} ...", flush=True)
            figures += importlib.import_module(f"benchmarks.data_parts.{part}").measure(options)
    show(figures)
    if arguments.json:
        arguments.json.write_text(as_json(figures) + "\n")


if __name__ == "__main__":
    main()
