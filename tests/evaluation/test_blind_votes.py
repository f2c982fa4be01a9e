"""Votes of blind comparisons are read from the files beside the report."""

import json
from pathlib import Path

from sdxl_pipeline.evaluation.blind_votes import read_votes

VOTES = {
    "report": "abc",
    "compared": [
        {"step": 20, "scale": 1, "label": "step 20"},
        {"step": 0, "scale": 1, "label": "base model"},
    ],
    "wins": [5, 1],
    "ties": 2,
    "p_value": 0.21875,
}


def test_read_votes_ignores_other_evaluations_and_broken_files(tmp_path: Path):
    (tmp_path / "votes_1.json").write_text(json.dumps(VOTES))
    (tmp_path / "votes_2.json").write_text(json.dumps(VOTES | {"report": "other"}))
    (tmp_path / "votes_3.json").write_text("{")
    (tmp_path / "votes_4.json").write_text(json.dumps(VOTES | {"wins": [1]}))
    (tmp_path / "votes_5.json").write_text("[]")
    (votes,) = read_votes(tmp_path, "abc")
    assert votes.wins == (5, 1)
    assert votes.describe() == (
        "step 20 was preferred 5 times, base model 1 times, 2 equal (p = 0.22, sign test)."
    )
