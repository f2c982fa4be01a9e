"""Paired differences of eval losses, and the asset checks based on them."""

import json
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from assets.checks.result_checks import check_evaluation
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.report import paired_difference, released_losses, write_report
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from tests.evaluation.test_report import make_report

BASE = [0.10, 0.20, 0.30, 0.15, 0.25, 0.18]


def loss_summary(losses: list[float], first: int = 0) -> LossSummary:
    by_image = tuple((f"image {first + n}", loss) for n, loss in enumerate(losses))
    return LossSummary(
        mean=float(np.mean(losses)), by_timestep=((500, float(np.mean(losses))),), by_image=by_image
    )


def check_results(
    folder: Path,
    trained: list[float],
    released: list[float] | None = None,
    settings: dict[str, object] | None = None,
    **changes: object,
):
    base = loss_summary(BASE[: len(trained)])
    lora = loss_summary(trained)
    values: dict[str, object] = {
        "base_loss": base,
        "lora_loss": lora,
        "eval_images": len(trained),
        "difference_to_base": paired_difference(lora, dict(base.by_image)),
    }
    if released is not None:
        values["difference_to_release"] = paired_difference(lora, dict(loss_summary(released).by_image))
    checks = check_evaluation(make_report(folder, **(values | changes)), TrainingSettings(**settings or {}))
    return {check.check_name: check for check in checks}


def test_paired_difference_uses_common_images_only():
    after, before = loss_summary([0.1, 0.4, 0.2]), {"image 0": 0.3, "image 2": 0.3, "another": 9.0}
    actual = paired_difference(after, before)
    expected = np.array([-0.2, -0.1])
    assert actual.images == 2
    assert actual.mean == pytest.approx(expected.mean())
    assert actual.standard_error == pytest.approx(expected.std(ddof=1) / np.sqrt(2))
    assert paired_difference(after, {}).standard_error is None
    assert paired_difference(after, {"image 0": 0.3}).standard_error is None


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ([0.0] * 6, False),  # regression: "base 0.1637, LoRA 0.1637" passed when the means were compared
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
def test_better_than_base_requires_two_standard_errors(tmp_path, change, passed):
    losses = [base + difference for base, difference in zip(BASE, change, strict=True)]
    check = check_results(tmp_path, losses)["better_than_base"]
    assert (check.passed, check.severity) == (passed, dg.AssetCheckSeverity.ERROR)
    assert "paired over 6 images" in str(check.description)


def test_better_than_base_with_fewer_than_two_images_warns(tmp_path):
    for checks in (
        check_results(tmp_path, [0.05]),
        check_results(tmp_path, [0.05], base_loss=None, lora_loss=None, difference_to_base=None),
    ):
        check = checks["better_than_base"]
        assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "eval_loss_disable" in str(check.description)


@pytest.mark.parametrize(
    ("count", "source", "passed"),
    [
        (4, "held-out share", True),
        (3, "held-out share", False),
        (6, "training images", False),
        (6, "eval dataset", True),
    ],
)
def test_overfitting_check_requires_four_untrained_images(tmp_path, count, source, passed):
    check = check_results(tmp_path, [0.01] * count, eval_source=source)["enough_eval_images"]
    assert (check.passed, check.severity) == (passed, dg.AssetCheckSeverity.WARN)
    assert ("cannot show over-fitting" in str(check.description)) == (not passed)


def test_not_worse_than_last_release_pairs_losses_by_image(tmp_path):
    better = [base - 0.05 for base in BASE]
    slightly_worse = [loss + 0.001 * (1 + n % 3) for n, loss in enumerate(better)]
    name = "not_worse_than_last_release"
    assert check_results(tmp_path, better)[name].passed, "no release yet"
    assert check_results(tmp_path, better, better)[name].passed
    assert check_results(tmp_path, better, slightly_worse)[name].passed
    worse = check_results(tmp_path, slightly_worse, better)[name]
    assert (worse.passed, worse.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check_results(tmp_path, slightly_worse, better, {"release_tolerance": 0.02})[name].passed
    assert not check_results(tmp_path, slightly_worse, better, {"release_tolerance": 0.005})[name].passed
    disjoint = paired_difference(loss_summary(better, 50), {})
    incomparable = check_results(tmp_path, better, better, difference_to_release=disjoint)[name]
    assert not incomparable.passed
    assert "the difference is inconclusive" in str(incomparable.description)


def test_released_losses_reads_written_report(tmp_path):
    write_report(
        make_report(tmp_path, base_loss=loss_summary(BASE), lora_loss=loss_summary(BASE)), "demo", None
    )
    assert list(released_losses(tmp_path / "report.json").values()) == BASE
    old_report = json.loads((tmp_path / "report.json").read_text())
    del old_report["lora_loss"]["by_image"]
    (tmp_path / "report.json").write_text(json.dumps(old_report))
    assert released_losses(tmp_path / "report.json") == {}
