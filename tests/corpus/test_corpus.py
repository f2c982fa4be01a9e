"""Every case of the corpus: a correct entry or a reason, and unaffected neighbours with their own captions."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.decoding.pixels import load_crop
from tests.corpus.cases import Case, Kept, cases, write_neighbours
from tests.corpus.pipeline import (
    check_frame,
    check_latents,
    encode,
    make_dataset,
    make_spec,
    planned_pixels,
    scan,
)

CASES = cases()


def planned(outcomes: Mapping[str, Kept | str]) -> dict[str, Kept]:
    return {
        path: outcome for path, outcome in outcomes.items() if isinstance(outcome, Kept) and outcome.planned
    }


def plan(folder: Path, frame: pd.DataFrame, outcomes: Mapping[str, Kept | str]) -> pd.DataFrame:
    """Return the crops; assert that the filtered images are the expected ones."""
    rows, dropped = plan_crops(make_dataset(folder), frame, 0, (), False)
    kept = {path for path, outcome in outcomes.items() if isinstance(outcome, Kept)}
    assert set(dropped["path"]) == kept - set(planned(outcomes))
    assert all(reason.startswith("too long and narrow") for reason in dropped["reason"])
    return rows


def check_pixels(folder: Path, rows: pd.DataFrame, outcomes: Mapping[str, Kept | str]) -> None:
    kept = planned(outcomes)
    assert set(rows["path"]) == set(kept)
    for row in rows.itertuples(index=False):
        difference = np.abs(
            load_crop(folder / row.path, row).astype(int) - planned_pixels(kept[row.path].image, row)
        )
        assert difference.mean() <= kept[row.path].tolerance, row.path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pipeline_case_has_its_outcome_and_neighbours_are_kept(case: Case, tmp_path: Path):
    folder = tmp_path / "data"
    outcomes: dict[str, Kept | str] = dict(write_neighbours(folder))
    case.write(folder)
    outcomes |= case.outcomes
    frame = scan(folder)
    check_frame(frame, outcomes)
    rows = plan(folder, frame, outcomes)
    check_pixels(folder, rows, outcomes)


def test_plan_crops_extreme_aspect_ratios_have_square_crops(tmp_path: Path):
    folder = tmp_path / "data"
    outcomes: dict[str, Kept | str] = {}
    for case in CASES:
        if "20000" in case.name:
            case.write(folder)
            outcomes |= {path: replace(kept, planned=True) for path, kept in case.outcomes.items()}
    frame = scan(folder)
    square = make_dataset(folder).model_copy(update={"crop_aspect": "square"})
    rows, dropped = plan_crops(square, frame, 0, (), False)
    assert (len(rows), len(dropped)) == (2, 0)
    check_pixels(folder, rows, outcomes)


def test_encode_whole_corpus_stores_all_planned_latents(tmp_path: Path):
    folder = tmp_path / "data"
    outcomes: dict[str, Kept | str] = dict(write_neighbours(folder))
    for case in CASES:
        case.write(folder)
        outcomes |= case.outcomes
    frame = scan(folder)
    check_frame(frame, outcomes)
    rows = plan(folder, frame, outcomes)
    spec = make_spec(tmp_path, folder, rows)
    cache = encode(spec)
    assert cache.failed == ()
    assert (cache.planned, cache.encoded + cache.reused) == (len(rows), len(rows))
    check_latents(spec, rows, outcomes)
    second = encode(spec)
    assert (second.encoded, second.reused, second.digest) == (0, len(rows), cache.digest)
