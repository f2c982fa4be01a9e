"""`sdxl-pipeline resize`: an adapter as a LoRA of another rank."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from sdxl_pipeline.cli.adapter_options import (
    ToolError,
    add_output_options,
    one_sentence_errors,
    positive_rank,
    show_approximation,
    show_error,
)

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "resize",
        help="change the rank of a LoRA",
        description="Write the nearest LoRA of a lower rank, or of the lowest rank per layer that keeps the relative error. A DoRA (with "
        "--base), LoHa or LoKr becomes a plain LoRA.",
    )
    parser.add_argument("adapter", type=Path, metavar="FILE", help="LoRA, DoRA, LoHa or LoKr (.safetensors)")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--rank", type=positive_rank, help="highest rank of a layer")
    target.add_argument(
        "--error", type=_relative_error, metavar="SHARE", help="largest relative error, for example 0.05"
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the adapter's base model; needed for a DoRA (default: SDXL-base's architecture)",
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Write the LoRA; return 2 if that is not possible."""
    try:
        with one_sentence_errors():
            from sdxl_pipeline.release.adapter_sources import open_base, read_adapter
            from sdxl_pipeline.release.low_rank_tools import write_resized

            with open_base(options.base) as (table, base):
                source = read_adapter(options.adapter.expanduser(), 1.0, table)
                result = write_resized(
                    options.output, source, table, base, options.rank, options.error, options.dtype
                )
    except ToolError as error:
        return show_error(error, console)
    show_approximation(options.output, result, options.layers, console)
    return 0


def _relative_error(text: str) -> float:
    if not 0 < (error := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a relative error; write a number between 0 and 1")
    return error
