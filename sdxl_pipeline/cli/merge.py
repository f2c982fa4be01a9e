"""`sdxl-pipeline merge`: LoRAs into a base model, or several LoRAs into one."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

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
        "merge",
        help="merge LoRAs into a base model, or several LoRAs into one",
        description="Merge LoRAs into the weights of a base model (--into), or write the weighted sum of several LoRAs as one LoRA. A sum of "
        "plain LoRAs is exact; DoRA, LoHa and LoKr need --rank.",
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="FILE[:SCALE]",
        help="LoRA, DoRA, LoHa or LoKr (.safetensors) and its weight in the sum (default 1)",
    )
    parser.add_argument(
        "--into",
        metavar="MODEL",
        help="base model: Hub id, folder or .safetensors checkpoint; --output ends in .safetensors for a single file, else it is a folder",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the LoRAs' base model without --into (default: SDXL-base's architecture)",
    )
    parser.add_argument(
        "--rank", type=positive_rank, help="rank of the sum (default: the sum of the ranks, exact)"
    )
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Write the merged model or the LoRA; return 2 if that is not possible."""
    try:
        with one_sentence_errors():
            return _merge(options, console)
    except ToolError as error:
        return show_error(error, console)


def parse_adapter(text: str) -> tuple[Path, float]:
    """Return the path and scale of FILE or FILE:SCALE. Raises ToolError for a scale that is not a finite number."""
    path, separator, scale = text.rpartition(":")
    if not separator or text.lower().endswith(".safetensors"):
        return Path(text).expanduser(), 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ToolError(f"{text}: the scale {scale!r} is not a finite number; write {path}:0.7, for example")
    return Path(path).expanduser(), value


def _merge(options: argparse.Namespace, console: Console) -> int:
    adapters = [parse_adapter(text) for text in options.adapters]
    if options.into and (options.base or options.rank or options.dtype != "auto"):
        raise ToolError(
            "--base, --rank and --dtype describe a LoRA, but --into writes a model; remove them, or remove --into"
        )
    if not options.into and len(adapters) == 1 and options.rank is None:
        raise ToolError(
            f"one adapter alone is already a LoRA file; add another, --into MODEL, or use resize {adapters[0][0].name}"
        )
    from sdxl_pipeline.release.adapter_sources import (
        layer_names,
        open_base,
        read_adapter,
        resolve_named_model,
    )

    if options.into:
        from sdxl_pipeline.release.merge import merge_into

        model = resolve_named_model(options.into)
        table = layer_names(model)
        sources = [read_adapter(path, scale, table) for path, scale in adapters]
        layers = merge_into(options.output, sources, model)
        console.print(
            f"{escape(str(options.output))}: {layers} layers of {escape(options.into)} changed",
            soft_wrap=True,
        )
        return 0
    from sdxl_pipeline.release.low_rank_tools import write_sum

    with open_base(options.base) as (table, base):
        sources = [read_adapter(path, scale, table) for path, scale in adapters]
        result = write_sum(options.output, sources, table, base, options.rank, options.dtype)
    show_approximation(options.output, result, options.layers, console)
    return 0
