"""Paired differences of eval losses, and the checks that judge a LoRA by them."""

import json
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from assets.checks.result_checks import check_evaluation
from sdxl_pipeline.evaluation.paired_difference import paired_difference, released_losses
from sdxl_pipeline.evaluation.report import write_report
from sdxl_pipeline.runtime.specs import LossSummary
from tests.evaluation.test_report import make_report

BASE = [0.10, 0.20, 0.30, 0.15, 0.25, 0.18]


def summary(losses: list[float], first: int = 0) -> LossSummary:
    by_image = tuple((f"image {first + n}", loss) for n, loss in enumerate(losses))
    return LossSummary(
        mean=float(np.mean(losses)), by_timestep=((500, float(np.mean(losses))),), by_image=by_image
    )


def judged(folder: Path, trained: list[float], released: list[float] | None = None, **changes: object):
    base = summary(BASE[: len(trained)])
    lora = summary(trained)
    values: dict[str, object] = {
        "base_loss": base,
        "lora_loss": lora,
        "eval_images": len(trained),
        "difference_to_base": paired_difference(lora, dict(base.by_image)),
    }
    if released is not None:
        values["difference_to_release"] = paired_difference(lora, dict(summary(released).by_image))
    checks = check_evaluation(make_report(folder, **(values | changes)))
    return {check.check_name: check for check in checks}


def test_paired_difference_is_the_mean_and_its_standard_error_over_common_images():
    after, before = summary([0.1, 0.4, 0.2]), {"image 0": 0.3, "image 2": 0.3, "another": 9.0}
    found = paired_difference(after, before)
    expected = np.array([-0.2, -0.1])
    assert found.images == 2
    assert found.mean == pytest.approx(expected.mean())
    assert found.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(2))
    assert paired_difference(after, {}).standard_error is None
    assert paired_difference(after, {"image 0": 0.3}).standard_error is None


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ([0.0] * 6, False),  # "base 0.1637, LoRA 0.1637" passed when the means were compared
        ([-0.01] * 6, True),
        (
            [-1e-6, -1e-6, -1e-6, 1e-6, -1e-6, 1e-6],
            False,
        ),  # lower on average, by less than two standard errors
        ([-0.02, -0.03, -0.01, -0.02, -0.02, -0.01], True),
        ([0.02, 0.03, 0.01, 0.02, 0.02, 0.01], False),
        ([float("nan")] * 6, False),
    ],
)
def test_better_than_base_needs_two_standard_errors(tmp_path, change, passes):
    check = judged(tmp_path, [base + each for base, each in zip(BASE, change, strict=True)])[
        "better_than_base"
    ]
    assert (check.passed, check.severity) == (passes, dg.AssetCheckSeverity.ERROR)
    assert "paired over 6 images" in str(check.description)


def test_better_than_base_of_one_image_or_none_warns_that_it_cannot_judge(tmp_path):
    for checks in (
        judged(tmp_path, [0.05]),
        judged(tmp_path, [0.05], base_loss=None, lora_loss=None, difference_to_base=None),
    ):
        check = checks["better_than_base"]
        assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "eval_loss_disable" in str(check.description)


@pytest.mark.parametrize(
    ("count", "source", "passes"),
    [
        (4, "held-out share", True),
        (3, "held-out share", False),
        (6, "training images", False),
        (6, "eval dataset", True),
    ],
)
def test_over_fitting_is_judged_on_four_images_that_were_not_trained(tmp_path, count, source, passes):
    check = judged(tmp_path, [0.01] * count, eval_source=source)["may_judge_over_fitting"]
    assert (check.passed, check.severity) == (passes, dg.AssetCheckSeverity.WARN)
    assert ("cannot judge over-fitting" in str(check.description)) == (not passes)


def test_a_release_is_compared_with_the_one_before_image_by_image(tmp_path):
    better = [base - 0.05 for base in BASE]
    slightly = [loss + 0.001 * (1 + n % 3) for n, loss in enumerate(better)]
    name = "not_worse_than_last_release"
    assert judged(tmp_path, better)[name].passed, "no release yet"
    assert judged(tmp_path, better, better)[name].passed
    assert judged(tmp_path, better, slightly)[name].passed
    worse = judged(tmp_path, slightly, better)[name]
    assert (worse.passed, worse.severity) == (False, dg.AssetCheckSeverity.WARN)
    others = judged(
        tmp_path, better, better, difference_to_release=paired_difference(summary(better, 50), {})
    )[name]
    assert not others.passed
    assert "cannot judge" in str(others.description)


def test_the_released_losses_are_read_back_from_the_published_report(tmp_path):
    write_report(make_report(tmp_path, base_loss=summary(BASE), lora_loss=summary(BASE)), "demo", None)
    assert list(released_losses(tmp_path / "report.json").values()) == BASE
    old = json.loads((tmp_path / "report.json").read_text())
    del old["lora_loss"]["by_image"]
    (tmp_path / "report.json").write_text(json.dumps(old))
    assert released_losses(tmp_path / "report.json") == {}
