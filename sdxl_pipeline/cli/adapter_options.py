"""What merge, extract and resize share: options, errors as one sentence with exit status 2, and the table of errors."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from sdxl_pipeline.release.formats.kohya import Approximation

DTYPES: Final = ("auto", "float16", "bfloat16", "float32")
_SHOWN_LAYERS: Final = 5


class ToolError(Exception):
    """A command cannot be carried out as written; the message is one sentence with what to write instead."""


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add --output, --dtype and --layers."""
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="new file; nothing is overwritten"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="data type of the LoRA's tensors (default: auto, float16 or, where its rounding error is large, bfloat16)",
    )
    parser.add_argument("--layers", action="store_true", help="show the error of every layer")


def positive_rank(text: str) -> int:
    """Return a rank >= 1; argparse reports the ValueError of any other text."""
    if (rank := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a rank; write a whole number of at least 1")
    return rank


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Raise ToolError for every error of a file, a format or a model."""
    from safetensors import SafetensorError

    from sdxl_pipeline.models.adapters.adapter_files import AdapterError
    from sdxl_pipeline.models.model_files import BaseModelError
    from sdxl_pipeline.release.formats import FormatError

    try:
        yield
    except (AdapterError, BaseModelError, FormatError, OSError, SafetensorError) as error:
        raise ToolError(str(error)) from error


def show_error(error: Exception, console: Console) -> int:
    """Print an error and return the exit status 2."""
    console.print(f"[bold red]{escape(str(error))}[/]", soft_wrap=True)
    return 2


def show_approximation(path: Path, result: "Approximation", all_layers: bool, console: Console) -> None:
    """Print the written file, its relative error in total, and the layers with the largest errors."""
    layers = sorted(result.layer_errors.items(), key=lambda item: -item[1])
    console.print(
        f"{escape(str(path))}: {len(layers)} layers, rank {result.rank}, relative error {result.relative_error:.3g}",
        soft_wrap=True,
    )
    table = Table("layer", "relative error", box=SIMPLE_HEAD)
    for name, error in layers if all_layers else layers[:_SHOWN_LAYERS]:
        table.add_row(escape(name), f"{error:.3g}")
    console.print(table)
