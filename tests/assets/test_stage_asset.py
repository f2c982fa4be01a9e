"""Errors that the user can fix are one sentence, wherever the asset of a stage raises them."""

import errno
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.stage_asset import StageAsset
from sdxl_pipeline.config.problems import Problem, ProjectError

PROBLEM = Problem(Path("config.json"), "mixed_precision", "fp16", "is not supported on cpu", "write no")


class Broken(StageAsset[Any, Any]):
    stage = "train"
    summary = data_version = metadata = check_results = None  # type: ignore[assignment]

    def __init__(self, error: Exception) -> None:
        self.error = error

    def build_spec(self) -> Any:
        raise self.error


Broken.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ProjectError([PROBLEM]), "mixed_precision"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/rows.parquet"), "/data/rows.parquet"),
    ],
)
def test_stage_asset_error_in_the_spec_is_a_failure_with_its_message(error: Exception, message: str) -> None:
    with pytest.raises(dg.Failure, match=message) as failure:
        Broken(error).materialize(None, None)  # type: ignore[arg-type]
    assert failure.value.allow_retries is False


def test_stage_asset_defect_in_the_spec_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        Broken(KeyError("rows")).materialize(None, None)  # type: ignore[arg-type]
