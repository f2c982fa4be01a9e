"""lineage.json in a run's folder: the names of the run, and the run it began from. No torch."""

from pathlib import Path

from pydantic import ValidationError

from sdxl_pipeline.project.sections.checkpoints import LATEST
from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.program import StageError
from sdxl_pipeline.protocol.specs import RunLineage
from sdxl_pipeline.store.files import write_text_atomic

LINEAGE_FILE = "lineage.json"
STATE = "state.json"
"""What makes a folder a checkpoint, beside its tensors."""


def write_lineage(run_dir: Path, lineage: RunLineage) -> None:
    """Record a run's lineage in its folder."""
    write_text_atomic(run_dir / LINEAGE_FILE, lineage.model_dump_json(indent=2) + "\n")


def read_lineage(run_dir: Path) -> RunLineage | None:
    """What `write_lineage` recorded; None in the folder of no run, or of one by an earlier version."""
    try:
        return RunLineage.model_validate_json((run_dir / LINEAGE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def lineage_of_checkpoint(place: Path) -> RunLineage | None:
    """The lineage of the run that a checkpoint lies in, `<run>/checkpoints/step-00000500`."""
    return read_lineage(place.parent.parent)


def chosen_checkpoint(settings: TrainingSettings) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; None for "latest" and for a start from nothing.

    Raises StageError when it is not there.
    """
    chosen = settings.resume_from_checkpoint
    if chosen is None or chosen == LATEST:
        return None
    place = Path(chosen).expanduser()
    if not (place / STATE).is_file():
        raise StageError(
            f"config.json: resume_from_checkpoint names {chosen}, where no checkpoint is; write the path of a folder such as "
            '<output_dir>/lora/<run>/checkpoints/step-00000500, or "latest", or "none"'
        )
    return place.resolve()
