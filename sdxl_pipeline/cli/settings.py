"""`sdxl-pipeline settings`: print the page of every accepted key."""

import argparse
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from sdxl_pipeline.config.settings_page import settings_page

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def add_parser(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("settings", help="print the page of every accepted key (docs/settings.md)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Print the page as plain text, without the console's formatting."""
    sys.stdout.write(settings_page())
    return 0
