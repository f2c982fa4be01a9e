"""Background uploads of checkpoint weights to the Hub during training (`push_checkpoints_to_hub`)."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

from sdxl_pipeline.config.schema.release import ReleaseSettings
from sdxl_pipeline.files.atomic_files import link_or_copy
from sdxl_pipeline.hub_client import describe_hub_error, upload
from sdxl_pipeline.training.checkpoint.checkpoint_files import exported_files

UPLOADS = "uploads"
"""Subfolder of a run with the files waiting for upload; they remain when their checkpoint is deleted."""


class CheckpointUploads:
    """A thread that uploads checkpoints one by one to `checkpoints/<run>/<checkpoint>` in the release repository.

    A failed upload is only reported: the weights are on disk. The thread is a daemon, so a stopped run does not wait for it.
    """

    def __init__(self, settings: ReleaseSettings, run_dir: Path, report: Callable[[str], object]) -> None:
        self._settings, self._run_dir, self._report = settings, run_dir, report
        self._queue: Queue[Path | None] = Queue()
        self._folder = run_dir / UPLOADS
        # leftovers of a killed run, whose checkpoints are written again or still exist
        shutil.rmtree(self._folder, ignore_errors=True)
        self._thread = threading.Thread(target=self._run, name="checkpoint-uploads", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Upload the exported weights of a checkpoint in the background; the checkpoint itself may be deleted meanwhile."""
        staged = self._folder / checkpoint.name
        for file in exported_files(checkpoint):
            target = staged / file.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, target)
        self._queue.put(staged)

    def finish(self) -> None:
        """Wait until every upload has succeeded or failed."""
        if self._queue.unfinished_tasks:
            self._report(
                f"Waiting for the upload of {self._queue.unfinished_tasks} checkpoints to {self._settings.hub_model_id}."
            )
        self._queue.put(None)
        self._thread.join()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self) -> None:
        while (staged := self._queue.get()) is not None:
            try:
                self._upload(staged)
            except Exception as error:
                self._report(
                    f"WARNING: {staged.name} could not be uploaded to {self._settings.hub_model_id}: {describe_hub_error(error)}. The training "
                    f"continues; the checkpoint is in {self._run_dir}."
                )
            shutil.rmtree(staged, ignore_errors=True)
            self._queue.task_done()

    def _upload(self, staged: Path) -> None:
        from huggingface_hub import HfApi

        commit = upload(
            HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None),
            staged,
            self._settings.hub_model_id or "",
            self._settings.model_card_private,
            f"{self._run_dir.name}: {staged.name}",
            path_in_repo=f"checkpoints/{self._run_dir.name}/{staged.name}",
            report=self._report,
        )
        self._report(f"{staged.name} is uploaded: {commit.commit_url}")
