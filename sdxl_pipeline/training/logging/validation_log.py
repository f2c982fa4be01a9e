"""validation.jsonl: which images a run has drawn. No torch."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.runtime.specs import ValidationImage
from sdxl_pipeline.training.logging.metrics_log import complete_lines

VALIDATION_FILE = "validation.jsonl"


class ValidationLog:
    """The images drawn so far: a line for each, those of a step together once all are drawn."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        self._run_dir = run_dir
        self._path = run_dir / VALIDATION_FILE
        self.images = [image for image in read_validation_log(run_dir) if image.step <= resumed_at]
        self._write(self.images, "w")

    def has(self, step: int) -> bool:
        """Whether the images of a step have been drawn."""
        return any(image.step == step for image in self.images)

    def add(self, images: Sequence[ValidationImage]) -> None:
        """Record the images of a step."""
        self.images += images
        self._write(images, "a")

    def _write(self, images: Sequence[ValidationImage], mode: str) -> None:
        # paths relative to the run, which may be moved
        lines = [
            image.model_copy(update={"path": os.path.relpath(image.path, self._run_dir)}).model_dump_json()
            + "\n"
            for image in images
        ]
        if mode == "w":
            write_text_atomic(self._path, "".join(lines))
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(lines)


def read_validation_log(run_dir: Path) -> list[ValidationImage]:
    """The images recorded in a run's folder that are still there."""
    path = run_dir / VALIDATION_FILE
    if not path.exists():
        return []
    rows = (json.loads(line) for line in complete_lines(path))
    images = [ValidationImage(**{**row, "path": str(run_dir / row["path"])}) for row in rows]
    return [image for image in images if Path(image.path).exists()]
