"""The checks of an evaluation: which apply, which block, and what they conclude from a report."""

from pathlib import Path

import dagster as dg
import pytest

from assets.checks.result_checks import blocking_failures, check_evaluation, evaluation_checks
from sdxl_pipeline.config.schema.evaluation import EVALUATION_CHECK_NAMES
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.evaluation_report import Memorisation, Overfitting, Selection, Veto
from sdxl_pipeline.runtime.specs import FailedItem
from tests.evaluation.test_report import make_report


def result(folder: Path, name: str, settings: dict[str, object] | None = None, **report: object):
    results = check_evaluation(make_report(folder, **report), TrainingSettings(**settings or {}))
    (found,) = [each for each in results if each.check_name == name]
    return found


def selection(**changes: object) -> Selection:
    values = {"requested": "best", "step": 40, "weights": "trained", "best_step": 40, "text": "Step 40."}
    return Selection.model_validate(values | changes)


def memorisation(flagged: int) -> Memorisation:
    return Memorisation(
        samples=16,
        flagged=flagged,
        limit=0.1,
        calibrated_on=40,
        pairs=(),
        sheet_path=None,
        text=f"{flagged} of 16.",
    )


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        ({}, set()),
        ({"num_caption_samples": 0}, {"not_memorised"}),
        ({"num_probe_images": 0}, {"not_overfitted"}),
        ({"eval_loss_disable": True}, {"not_overfitted", "checkpoint_selected"}),
    ],
)
def test_evaluation_checks_leave_out_what_is_not_measured(settings, left_out):
    names = [check.name for check in evaluation_checks(TrainingSettings(**settings))]
    assert set(names) == {*EVALUATION_CHECK_NAMES} - left_out
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", EVALUATION_CHECK_NAMES)
@pytest.mark.parametrize("severity", ["blocking", "warning"])
def test_evaluation_checks_severity_is_the_configured_one(name, severity):
    checks = {
        check.name: check for check in evaluation_checks(TrainingSettings(evaluation_checks={name: severity}))
    }
    defaults = {check.name: check for check in evaluation_checks(TrainingSettings())}
    assert checks.pop(name).blocking == (severity == "blocking")
    defaults.pop(name)
    assert checks == defaults


def test_blocking_failures_follow_the_settings(tmp_path):
    broken = {"broken_images": (FailedItem(name="star", reason="black"),)}
    failed = result(tmp_path, "images_valid", **broken)
    assert blocking_failures([failed]) == [failed]
    warning = result(tmp_path, "images_valid", {"evaluation_checks": {"images_valid": "warning"}}, **broken)
    assert not warning.passed
    assert blocking_failures([warning]) == []


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"best_step": None, "text": "There is no held-out image: the last step."}, False),
        ({"best_step": None, "requested": "last"}, True),
        ({"requested": "step-40", "best_step": 20}, True),
        ({"vetoed": True, "vetoes": (Veto(step=40, reason="black image"),)}, False),
    ],
)
def test_checkpoint_selected_fails_without_a_basis_or_with_a_veto(tmp_path, changes, passed):
    found = result(tmp_path, "checkpoint_selected", selected=selection(**changes))
    assert (found.passed, found.severity) == (passed, dg.AssetCheckSeverity.WARN)
    assert found.description == selection(**changes).text


@pytest.mark.parametrize(("from_step", "passed"), [(None, True), (60, True), (40, False), (20, False)])
def test_not_overfitted_fails_from_the_step_of_overfitting_on(tmp_path, from_step, passed):
    overfitting = Overfitting(conclusive=True, from_step=from_step, gap=None, text="Measured.")
    found = result(tmp_path, "not_overfitted", overfitting=overfitting, step=40)
    assert (found.passed, found.description) == (passed, "Measured.")


def test_not_overfitted_with_too_few_images_is_inconclusive(tmp_path):
    overfitting = Overfitting(conclusive=False, from_step=None, gap=None, text="Only 2 held-out images.")
    settings = {"evaluation_checks": {"not_overfitted": "blocking"}}
    found = result(tmp_path, "not_overfitted", settings, overfitting=overfitting)
    assert not found.passed
    assert blocking_failures([found]) == []


@pytest.mark.parametrize(("flagged", "passed"), [(0, True), (1, True), (2, False), (16, False)])
def test_not_memorised_blocks_above_the_limit(tmp_path, flagged, passed):
    found = result(tmp_path, "not_memorised", memorisation=memorisation(flagged))
    assert (found.passed, found.severity) == (passed, dg.AssetCheckSeverity.ERROR)
    assert found.description == f"{flagged} of 16."


def test_new_checks_of_a_report_of_an_earlier_version_are_inconclusive(tmp_path):
    for name in ("checkpoint_selected", "not_overfitted", "not_memorised"):
        found = result(tmp_path, name)
        assert (found.passed, found.severity) == (False, dg.AssetCheckSeverity.WARN)
