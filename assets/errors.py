"""Errors that the user can fix, as failed steps with a message instead of a stack trace."""

from collections.abc import Iterator
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
