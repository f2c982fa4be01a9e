"""The console script `sdxl-pipeline`: parses the command line and runs one command.

Torch is never imported here: `doctor` must be fast, and must work in a broken installation.
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from sdxl_pipeline.cli import (
    doctor,
    extract,
    generate,
    merge,
    prune,
    release,
    reproduce,
    resize,
    runs,
    settings,
)

COMMANDS = (doctor, settings, prune, runs, release, generate, reproduce, merge, extract, resize)

INTERRUPTED = 130
"""Exit status of a shell's command that an interrupt ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status: 1 if something has to be fixed, 130 after an interrupt."""
    parser = argparse.ArgumentParser(
        prog="sdxl-pipeline", description="Fine-tune SDXL as a graph of data assets."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    console = Console(highlight=False, emoji=False)
    try:
        status: int = options.run(options, console)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        return INTERRUPTED
    return status


if __name__ == "__main__":
    sys.exit(main())
