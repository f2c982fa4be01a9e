"""What steps write to the event log: progress of long loops, and errors that the user can fix without a stack trace."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import dagster as dg

from resources.storage import full_disk_as_failure
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.data.buckets.face_detection import FaceDetectorError
from sdxl_pipeline.data.buckets.holdout import HoldoutError
from sdxl_pipeline.data.captions.text_files import CaptionError
from sdxl_pipeline.data.scan.dataset_scan import DatasetFolderError
from sdxl_pipeline.data.sources import SourceError
from sdxl_pipeline.files.storage_errors import StorageError
from sdxl_pipeline.models.adapters.adapter_files import AdapterError
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.release.release_inputs import ExportError, ReleaseError
from sdxl_pipeline.runtime.stage_runner import UserError

PROGRESS_SECONDS = 10.0
USER_ERRORS = (
    CaptionError,
    DatasetFolderError,
    FaceDetectorError,
    HoldoutError,
    ProjectError,
    SourceError,
    ExportError,
    ReleaseError,
    AdapterError,
    BaseModelError,
    UserError,
    StorageError,
)


@contextmanager
def user_errors_as_failures() -> Iterator[None]:
    """Convert the library's own errors into `dagster.Failure` with the same message, without retries."""
    try:
        with full_disk_as_failure():
            yield
    except USER_ERRORS as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error


def log_progress(context: dg.AssetExecutionContext, action: str) -> Callable[[int, int], None]:
    """Return a callback `(done, total)` that logs "`done` of `total` `action`." at most every ten seconds."""
    logged_at = time.monotonic()

    def on_progress(done: int, total: int) -> None:
        nonlocal logged_at
        if time.monotonic() - logged_at >= PROGRESS_SECONDS:
            logged_at = time.monotonic()
            context.log.info(f"{done} of {total} {action}.")

    return on_progress
