"""Finished runs are found by the beginning of their identity, also after their folder was moved."""

import os
import shutil
from pathlib import Path

import pytest

from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.finished_runs import FINISHED, RUNS, find_run, finished_run, list_runs
from tests.support.finished_run import write_finished_run

FIRST, SECOND = "abcdefgh" + "0" * 56, "abcdefgh" + "1" * 56


@pytest.fixture
def output_dir(tmp_path):
    for number, identity in enumerate((SECOND, FIRST)):
        run_dir = tmp_path / "output" / RUNS / identity[:16]
        write_finished_run(run_dir, identity)
        os.utime(run_dir / FINISHED, (number, number))
    (tmp_path / "output" / RUNS / "unfinished").mkdir()
    return tmp_path / "output"


def test_list_runs_returns_the_earliest_finished_first(output_dir, tmp_path):
    assert [run.identity for run in list_runs(output_dir)] == [SECOND, FIRST]
    assert list_runs(tmp_path / "nowhere") == []


def test_find_run_in_a_moved_folder_has_paths_of_the_new_one(output_dir, tmp_path):
    moved = Path(shutil.move(output_dir, tmp_path / "moved"))
    run = find_run(moved, FIRST[:9])
    assert run.identity == FIRST
    assert run.weights_path.startswith(str(moved))
    assert finished_run(Path(run.run_dir), FIRST) == run


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("abcdefg", "too short for a run; write at least 8"),
        ("abcdefgh", "several runs begin with"),
        ("12345678", f"no finished run begins with '12345678'.*{FIRST[:16]}"),
    ],
)
def test_find_run_not_exactly_one_is_an_error_that_lists_the_runs(output_dir, prefix, message):
    with pytest.raises(UserError, match=message):
        find_run(output_dir, prefix)


def test_find_run_changed_weights_are_an_error(output_dir):
    Path(find_run(output_dir, FIRST).weights_path).write_bytes(b"changed")
    with pytest.raises(UserError, match="is not what the training wrote"):
        find_run(output_dir, FIRST)
