"""The weights of checkpoints, uploaded to the Hub while the training goes on (`push_checkpoints_to_hub`)."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import link_or_copy
from sdxl_pipeline.hub_client import explain, upload
from sdxl_pipeline.training.checkpoint.checkpoints import exported_files

UPLOADS = "uploads"
"""The folder in a run's own that holds what is still to be uploaded; it outlives the checkpoints themselves."""


class CheckpointUploads:
    """A thread that uploads one checkpoint after another to `checkpoints/<run>/<checkpoint>` in the repository of the release.

    A failed upload is reported and ends nothing: the weights are on disk. The thread is a daemon, so a stopped run does not wait for it.
    """

    def __init__(self, settings: TrainingSettings, run_dir: Path, report: Callable[[str], object]) -> None:
        self._settings, self._run_dir, self._report = settings, run_dir, report
        self._waiting: Queue[Path | None] = Queue()
        self._folder = run_dir / UPLOADS
        shutil.rmtree(
            self._folder, ignore_errors=True
        )  # left by a killed run, whose checkpoints are written again or still there
        self._thread = threading.Thread(target=self._work, name="checkpoint-uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Upload the weights of a checkpoint as users load them, in the background; the checkpoint itself may be deleted meanwhile."""
        kept = self._folder / checkpoint.name
        for file in exported_files(checkpoint):
            target = kept / file.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
        self._waiting.put(kept)

    def finish(self) -> None:
        """Wait until everything that was added has been uploaded, or has failed."""
        if self._waiting.unfinished_tasks:
            self._report(
                f"Waiting for the upload of {self._waiting.unfinished_tasks} checkpoints to {self._settings.hub_model_id}."
            )
        self._waiting.put(None)
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self) -> None:
        while (kept := self._waiting.get()) is not None:
            try:
                self._upload(kept)
            except Exception as error:
                self._report(
                    f"WARNING: {kept.name} could not be uploaded to {self._settings.hub_model_id}: {explain(error)}. The training goes "
                    f"on, and the checkpoint is in {self._run_dir}."
                )
            shutil.rmtree(kept, ignore_errors=True)
            self._waiting.task_done()

    def _upload(self, kept: Path) -> None:
        from huggingface_hub import HfApi

        commit = upload(
            HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None),
            kept,
            self._settings.hub_model_id or "",
            self._settings.model_card_private,
            f"{self._run_dir.name}: {kept.name}",
            path_in_repo=f"checkpoints/{self._run_dir.name}/{kept.name}",
            report=self._report,
        )
        self._report(f"{kept.name} is uploaded: {commit.commit_url}")
