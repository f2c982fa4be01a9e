"""Validation of `resume_from_checkpoint`: the folder of a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

from sdxl_pipeline.config.paths import exists
from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE, LATEST
from sdxl_pipeline.config.validators.dataset_rules import Finding

NOT_A_CHECKPOINT = "which is not a checkpoint"
CHECKPOINT_HINT = (
    "write the path of a folder such as <output_dir>/lora/<run>/checkpoints/step-00000500, "
    'or "latest", or "none"'
)


def checkpoint_path_of(written: str | None, folder: Path) -> Path | None:
    """Return the path, relative to the project's folder; None for "latest" and for None (start at step 0)."""
    return None if written in (None, LATEST) else folder / Path(written or "").expanduser()


def is_checkpoint(path: Path) -> bool:
    """Return whether the folder contains a checkpoint, complete or not."""
    return exists(path / CHECKPOINT_STATE)


def check_resume_from(written: str | None, folder: Path) -> Iterator[Finding]:
    """Yield a finding if there is no checkpoint at the path. Its content is checked at the start of a run."""
    path = checkpoint_path_of(written, folder)
    if path is not None and not is_checkpoint(path):
        yield Finding("resume_from_checkpoint", f"names {path}, {NOT_A_CHECKPOINT}", CHECKPOINT_HINT)
