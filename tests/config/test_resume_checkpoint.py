"""Holds: a checkpoint that is named must be there when the project is read, from whose folder its path begins."""

import pytest

from sdxl_pipeline.config.loader import load_project


def test_a_checkpoint_that_is_not_there_is_told_with_the_project(problems_of):
    problem = problems_of({"resume_from_checkpoint": "kept/good"})["resume_from_checkpoint"]
    assert "kept/good, where no checkpoint is" in problem.message
    assert '"latest", or "none"' in problem.hint


def test_one_that_is_there_is_known_by_its_place(write_project):
    folder = write_project({"resume_from_checkpoint": "kept/good"})
    (folder / "kept" / "good").mkdir(parents=True)
    (folder / "kept" / "good" / "state.json").write_text("{}")
    assert load_project(folder).training.resume_from_checkpoint == str(folder.resolve() / "kept" / "good")


@pytest.mark.parametrize("word", ["latest", "none"])
def test_words_name_no_folder(write_project, word):
    written = load_project(write_project({"resume_from_checkpoint": word})).training.resume_from_checkpoint
    assert written == (None if word == "none" else word)
