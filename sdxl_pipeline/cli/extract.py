"""`sdxl-pipeline extract`: the LoRA nearest to the difference of a fine-tuned model and its base model."""

import argparse
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
        "extract",
        help="extract a LoRA from a fine-tuned model",
        description="Write the LoRA that is nearest to the difference of a fine-tuned model to its base model, layer by layer.",
    )
    parser.add_argument(
        "model",
        metavar="TUNED",
        help="fine-tuned model: Hub id, folder, .safetensors checkpoint, or the folder `unet` of a run",
    )
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model that it was tuned from")
    parser.add_argument("--rank", required=True, type=positive_rank, help="rank of the LoRA")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Write the LoRA; return 2 if that is not possible."""
    try:
        with one_sentence_errors():
            from sdxl_pipeline.release.adapter_sources import layer_names, resolve_named_model
            from sdxl_pipeline.release.low_rank_tools import write_extracted

            base = resolve_named_model(options.base)
            result, others = write_extracted(
                options.output, options.model, base, layer_names(base), options.rank, options.dtype
            )
    except ToolError as error:
        return show_error(error, console)
    show_approximation(options.output, result, options.layers, console)
    if others:
        console.print(f"{others} biases and norms of the UNet differ too; no LoRA contains them.")
    return 0
