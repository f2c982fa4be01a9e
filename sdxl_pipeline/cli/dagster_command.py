"""Materializing assets with the `dagster` command in a child process, so that the run is in the repository's history and in the UI."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
INSTANCE_FILE: Final = "dagster.yaml"


def materialize(
    selection: str, run_config: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None
) -> int:
    """Materialize the selected assets and return the exit status of `dagster asset materialize`, which prints its log.

    The instance is the repository's, as in the Makefile; an installed package without one uses DAGSTER_HOME.
    """
    command = [
        "-m",
        "dagster",
        "asset",
        "materialize",
        "-m",
        "sdxl_pipeline.definitions",
        "--select",
        selection,
    ]
    if run_config:
        command += ["--config-json", json.dumps(run_config)]
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=_environment() | dict(environment or {}), check=False
    ).returncode


def select(keys: Sequence[str]) -> str:
    """Return the selection of the assets with these keys and of everything upstream of them."""
    return " or ".join(f'+key:"{key}"' for key in keys)


def _environment() -> dict[str, str]:
    found = dict(os.environ)
    if (REPOSITORY / INSTANCE_FILE).is_file():
        found["DAGSTER_HOME"] = str(REPOSITORY)
    return found
