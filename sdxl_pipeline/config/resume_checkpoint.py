"""What `resume_from_checkpoint` names: the folder of a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from sdxl_pipeline.config.paths import exists
from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE, LATEST
from sdxl_pipeline.config.validators.dataset_rules import Finding

NO_CHECKPOINT = "where no checkpoint is"
NAME_ONE = (
    "write the path of a folder such as <output_dir>/lora/<run>/checkpoints/step-00000500, "
    'or "latest", or "none"'
)


def named_checkpoint(written: str | None, folder: Path) -> Path | None:
    """The path that is written, seen from the project's folder; None for "latest" and for a start from nothing."""
    return None if written in (None, LATEST) else folder / Path(written or "").expanduser()


def is_checkpoint(place: Path) -> bool:
    """Whether a checkpoint lies there, in whatever condition."""
    return exists(place / CHECKPOINT_STATE)


def check_resume_from(written: str | None, folder: Path) -> Iterator[Finding]:
    """Whether there is what is named, seen from the project's folder; what it holds is seen when a run begins."""
    place = named_checkpoint(written, folder)
    if place is not None and not is_checkpoint(place):
        yield Finding("resume_from_checkpoint", f"names {place}, {NO_CHECKPOINT}", NAME_ONE)
