"""The names of a run, and the run it began from: in lineage.json of its folder, and in each of its checkpoints. No torch."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdxl_pipeline.config.resume_checkpoint import NAME_ONE, NO_CHECKPOINT, is_checkpoint, named_checkpoint
from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import RunLineage, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError

LINEAGE_FILE = "lineage.json"
SPEC_FILE = "spec.json"
"""The training's own spec beside its weights: the record of what made them, read again by the evaluation and by later runs."""


def write_lineage(run_dir: Path, lineage: RunLineage) -> None:
    """Record a run's lineage in its folder."""
    write_text_atomic(run_dir / LINEAGE_FILE, lineage.model_dump_json(indent=2) + "\n")


def read_lineage(run_dir: Path) -> RunLineage | None:
    """What `write_lineage` recorded; None in the folder of no run, or of one by an earlier version."""
    try:
        return RunLineage.model_validate_json((run_dir / LINEAGE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def read_spec(run_dir: Path) -> TrainSpec | None:
    """Return the spec of the run in a folder; None where there is none, or one of another version."""
    try:
        return TrainSpec.model_validate_json((run_dir / SPEC_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def lineage_of_checkpoint(place: Path) -> RunLineage | None:
    """The lineage of the run that a checkpoint is of, wherever it lies; None where that is not known."""
    state = _read_state(place)
    try:
        return RunLineage.model_validate(state.get("lineage"))
    except ValidationError:  # by an earlier version, which left it to the folder of the run
        run = run_of_checkpoint(place)
        return None if run is None else read_lineage(run)


def run_of_checkpoint(place: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in, `<run>/checkpoints/step-00000500`; None for one that lies elsewhere."""
    run = place.parent.parent
    lineage = read_lineage(run)
    is_own = lineage is not None and lineage.identity == _read_state(place).get("identity")
    return run if is_own else None


def chosen_checkpoint(settings: TrainingSettings) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; None for "latest" and for a start from nothing.

    Raises UserError when it is not there.
    """
    place = named_checkpoint(settings.resume_from_checkpoint, Path())
    if place is not None and not is_checkpoint(place):
        raise UserError(f"config.json: resume_from_checkpoint names {place}, {NO_CHECKPOINT}; {NAME_ONE}")
    return place and place.resolve()


def _read_state(place: Path) -> dict[str, Any]:
    try:
        state = json.loads((place / CHECKPOINT_STATE).read_bytes())
    except (OSError, ValueError):  # whoever begins from it tells that it is damaged
        return {}
    return state if isinstance(state, dict) else {}
