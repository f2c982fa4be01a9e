"""The selected checkpoint: one standard error, requests, refusals, and which checkpoints are evaluated at all."""

from collections.abc import Mapping
from itertools import pairwise

import pytest

from sdxl_pipeline.evaluation.report import paired_difference
from sdxl_pipeline.evaluation.selection import (
    limit_candidates,
    lowest_loss,
    require_step,
    select,
    within_one_error,
)
from sdxl_pipeline.runtime.evaluation_report import CheckpointLoss, LossSummary, Selection, Veto
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import UserError
from tests.support.eval_losses import around, loss_summary

BASE = loss_summary([0.5, 0.5, 0.5, 0.5])


def rows(losses: Mapping[int, LossSummary], *, held_out: bool = True) -> list[CheckpointLoss]:
    best = dict(losses[lowest_loss(losses)].by_image)
    return [
        CheckpointLoss(
            step=step,
            weights="trained",
            sha256="ab" * 32,
            held_out=loss,
            probe=None,
            to_base=paired_difference(loss, dict(BASE.by_image)),
            to_best=paired_difference(loss, best) if held_out else None,
        )
        for step, loss in losses.items()
    ]


def choose(losses: Mapping[int, LossSummary], requested: str = "best", **options: object) -> Selection:
    return select(rows(losses), list(losses), requested, "trained", **options)  # type: ignore[arg-type]


SERIES = {100: around(0.30), 200: around(0.201, 0.01), 300: around(0.20), 400: around(0.25)}
"""Step 200 is 0.001 above step 300, with a standard error of 0.0058."""


def test_select_best_is_the_earliest_within_one_error():
    selection = choose(SERIES)
    assert (selection.step, selection.best_step, selection.within_one_error) == (200, 300, (200, 300))
    assert selection.text == (
        "Step 200 is selected: the earliest of the steps 200, 300, which are within one standard error of the lowest held-out eval loss "
        "(0.20000), that of step 300."
    )


@pytest.mark.parametrize(("excess", "within"), [(0.0057, True), (0.0059, False)])
def test_within_one_error_compares_with_the_error_of_the_difference(excess: float, within: bool):
    # differences of +-0.01 over 4 images: sd 0.01155, standard error 0.00577
    losses = {1: around(0.2 + excess, 0.01), 2: around(0.2)}
    assert within_one_error(losses, 2) == ((1, 2) if within else (2,))


def test_within_one_error_one_image_has_no_error():
    losses = {1: loss_summary([0.2001]), 2: loss_summary([0.2])}
    assert within_one_error(losses, 2) == (2,)


def test_lowest_loss_of_equal_ones_is_the_earliest():
    assert lowest_loss({3: around(0.2), 1: around(0.2), 2: around(0.3)}) == 1


def test_select_last_and_requested_step():
    assert choose(SERIES, "last").step == 400
    requested = choose(SERIES, "step-100")
    assert (requested.step, requested.best_step, requested.vetoed) == (100, 300, False)
    assert "as released_checkpoint requests" in requested.text


def test_select_without_held_out_images_is_the_last():
    selection = select(rows(SERIES, held_out=False), list(SERIES), "best", "trained")
    assert (selection.step, selection.best_step, selection.within_one_error) == (400, None, ())
    assert "no eval losses of held-out images" in selection.text
    refused = select(
        rows(SERIES, held_out=False), list(SERIES), "best", "trained", [Veto(step=400, reason="black")]
    )
    assert refused.step == 300
    assert select((), [100, 200], "best", "trained").step == 200


def test_select_refused_step_is_replaced_and_named():
    selection = choose(SERIES, vetoes=[Veto(step=200, reason="its image star is black")])
    assert (selection.step, selection.vetoed) == (300, False)
    assert selection.text.endswith("Step 200 was refused: its image star is black.")
    assert choose(SERIES, vetoes=[Veto(step=step, reason="black") for step in (200, 300)]).step == 400


def test_select_all_refused_is_the_last_and_vetoed():
    selection = choose(SERIES, vetoes=[Veto(step=step, reason="black") for step in SERIES])
    assert (selection.step, selection.vetoed) == (400, True)
    assert "all of them were refused" in selection.text


def test_select_requested_step_that_is_refused_stays_selected():
    selection = choose(SERIES, "step-200", vetoes=[Veto(step=200, reason="black")])
    assert (selection.step, selection.vetoed) == (200, True)


def test_select_ignores_weights_that_cannot_be_selected():
    ema = [
        row.model_copy(update={"weights": "ema", "step": 50, "held_out": around(0.1)})
        for row in rows(SERIES)[:1]
    ]
    assert select([*ema, *rows(SERIES)], list(SERIES), "best", "trained").step == 200


def test_select_later_step_only_if_its_images_are_clearly_more_similar():
    better = {200: [0.5, 0.6, 0.7], 300: [0.6, 0.71, 0.79]}
    selection = choose(SERIES, similarities=better)
    assert selection.step == 300
    assert "more similar to the training images" in selection.text
    noisy = {200: [0.5, 0.6, 0.7], 300: [0.8, 0.4, 0.75]}  # mean +0.05, standard error 0.14
    assert choose(SERIES, similarities=noisy).step == 200


def weights(step: int, kind: str = "trained") -> CheckpointWeights:
    return CheckpointWeights.model_validate(
        {
            "step": step,
            "epochs": 1,
            "samples": 1,
            "weights": kind,
            "path": "w",
            "sha256": "a",
            "is_final": False,
        }
    )


def test_limit_candidates_keeps_last_and_requested_steps():
    every = [weights(step, kind) for step in range(10, 510, 10) for kind in ("ema", "trained")]
    kept, left_out = limit_candidates(every, "best", limit=20)
    steps = sorted({each.step for each in kept})
    assert (len(steps), len(kept), steps[-1], len(left_out)) == (20, 40, 500, 30)
    assert {after - before for before, after in pairwise(steps)} <= {20, 30}
    kept, left_out = limit_candidates(every, "step-10", limit=20)
    steps = sorted({each.step for each in kept})
    assert (len(steps), steps[0], steps[-1]) == (20, 10, 500)
    kept, _ = limit_candidates(every, "step-10", limit=20, best_step=20)
    steps = sorted({each.step for each in kept})
    assert (len(steps), steps[:2], steps[-1]) == (20, [10, 20], 500)
    assert limit_candidates(every[:8], "best", limit=20) == (every[:8], [])


def test_require_step_unknown_one_lists_the_existing_ones():
    existing = [weights(100), weights(200), weights(150, "ema")]
    for requested in ("best", "last", "step-100"):
        require_step(existing, requested, "trained")
    with pytest.raises(
        UserError, match=r'"step-150" has no checkpoint with trained weights.*"step-100", "step-200"'
    ):
        require_step(existing, "step-150", "trained")
