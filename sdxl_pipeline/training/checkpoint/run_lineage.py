"""The fingerprints of a run and its ancestor, stored in lineage.json of its folder and in each of its checkpoints. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_pipeline.config.resume_checkpoint import (
    CHECKPOINT_HINT,
    NOT_A_CHECKPOINT,
    checkpoint_path_of,
    is_checkpoint,
)
from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE, CheckpointSettings
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import RunLineage, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError

LINEAGE_FILE = "lineage.json"
SPEC_FILE = "spec.json"
"""The training spec beside the weights it produced, read by the evaluation and by later runs."""


def write_lineage(run_dir: Path, lineage: RunLineage) -> None:
    """Write a run's lineage to its folder."""
    write_text_atomic(run_dir / LINEAGE_FILE, lineage.model_dump_json(indent=2) + "\n")


def read_lineage(run_dir: Path) -> RunLineage | None:
    """Return what `write_lineage` wrote; None for a folder without a run, or with one of an earlier version."""
    try:
        return RunLineage.model_validate_json((run_dir / LINEAGE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def read_spec(run_dir: Path) -> TrainSpec | None:
    """Return the spec of the run in a folder; None if there is none, or one of another version."""
    try:
        return TrainSpec.model_validate_json((run_dir / SPEC_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def lineage_of_checkpoint(path: Path) -> RunLineage | None:
    """Return the lineage of the run that a checkpoint belongs to, wherever it is stored; None if unknown."""
    state = _read_state(path)
    try:
        return RunLineage.model_validate(state.get("lineage"))
    except ValidationError:  # written by an earlier version, which stored it only in the folder of the run
        run = run_of_checkpoint(path)
        return None if run is None else read_lineage(run)


def run_of_checkpoint(path: Path) -> Path | None:
    """Return the folder of the run that contains a checkpoint, `<run>/checkpoints/step-00000500`; None if it is stored elsewhere."""
    run = path.parent.parent
    lineage = read_lineage(run)
    is_of_run = lineage is not None and lineage.identity == _read_state(path).get("identity")
    return run if is_of_run else None


def configured_checkpoint(settings: CheckpointSettings) -> Path | None:
    """Return the path in `resume_from_checkpoint`; None for "latest" and for a start from step 0.

    Raises UserError if there is no checkpoint at it.
    """
    path = checkpoint_path_of(settings.resume_from_checkpoint, Path())
    if path is not None and not is_checkpoint(path):
        raise UserError(
            f"config.json: resume_from_checkpoint is {path}, {NOT_A_CHECKPOINT}; {CHECKPOINT_HINT}"
        )
    return path and path.resolve()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / CHECKPOINT_STATE).read_bytes())
    except (OSError, ValueError):  # reported as corrupt when the run resumes from it
        return {}
    return state if isinstance(state, dict) else {}
