"""resume_from_checkpoint must be an existing checkpoint, relative to the project's folder."""

import pytest

from sdxl_pipeline.config.loader import load_project


def test_load_project_missing_checkpoint_is_a_problem(problems_of):
    problem = problems_of({"resume_from_checkpoint": "kept/good"})["resume_from_checkpoint"]
    assert "kept/good, which is not a checkpoint" in problem.message
    assert '"latest", or "none"' in problem.hint


def test_load_project_existing_checkpoint_is_resolved_to_its_path(write_project):
    folder = write_project({"resume_from_checkpoint": "kept/good"})
    (folder / "kept" / "good").mkdir(parents=True)
    (folder / "kept" / "good" / "state.json").write_text("{}")
    assert load_project(folder).training.resume_from_checkpoint == str(folder.resolve() / "kept" / "good")


@pytest.mark.parametrize("word", ["latest", "none"])
def test_load_project_checkpoint_keywords_are_not_paths(write_project, word):
    written = load_project(write_project({"resume_from_checkpoint": word})).training.resume_from_checkpoint
    assert written == (None if word == "none" else word)
