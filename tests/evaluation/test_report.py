"""Evaluation report: consistent metrics, comparison with the last release, working image links, and no local path."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sdxl_pipeline.evaluation.report import (
    METRIC_LABELS,
    change_since,
    metrics_table,
    paired_difference,
    plot_losses,
    plot_losses_by_step,
    portable_report,
    report_metrics,
    write_report,
)
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    ClipSummary,
    Cmmd,
    EvaluationReport,
    LossSummary,
    Memorisation,
    MemorisedPair,
    Overfitting,
    PairedDifference,
    ProbeGap,
    ScorePair,
    Scores,
    Selection,
)
from sdxl_pipeline.runtime.specs import CheckpointWeights, FailedItem, ValidationImage
from sdxl_pipeline.training.logging.run_logs import EvalRow
from tests.support.eval_losses import around

BASE = LossSummary(mean=0.4, by_timestep=((125, 0.6), (875, 0.2)))
LORA = LossSummary(mean=0.1, by_timestep=((125, 0.15), (875, 0.05)))


def make_report(folder: Path, **changes: object) -> EvaluationReport:
    image = ValidationImage(
        step=40, name="star", prompt="a star", path=str(folder / "images" / "star.png"), seed=1
    )
    values = {
        "identity": "cd" * 32,
        "reused": False,
        "lora_sha256": "ab" * 32,
        "eval_source": "held-out share",
        "eval_images": 5,
        "base_loss": BASE,
        "lora_loss": LORA,
        "base_clip": ClipSummary(min=10, max=30, mean=20, std=5),
        "lora_clip": ClipSummary(min=15, max=35, mean=25, std=5),
        "gallery_path": str(folder / "gallery.png"),
        "images": (image,),
        "broken_images": (),
        "loss_plot_path": str(folder / "loss_by_timestep.png"),
        "report_path": str(folder / "report.md"),
        "change_since_release": {},
        "seconds": 1.5,
    }
    return EvaluationReport.model_validate(values | changes)


def make_complete_report(folder: Path) -> EvaluationReport:
    """Return a report with every part: three checkpoints, the second selected, over-fitting from the third, one copy."""
    base, losses = around(0.4), {10: around(0.3), 20: around(0.2), 30: around(0.25, 0.01)}
    pair = ScorePair(
        base=20.0, lora=25.0, difference=PairedDifference(images=4, mean=5.0, standard_error=1.0)
    )
    return make_report(
        folder,
        step=20,
        base_loss=base,
        lora_loss=losses[20],
        base_probe=base,
        loss_by_step_path=str(folder / "loss_by_step.png"),
        html_path=str(folder / "report.html"),
        blind_ab_path=str(folder / "blind_ab.html"),
        checkpoints=tuple(
            CheckpointLoss(
                step=step,
                weights="trained",
                sha256="ab" * 32,
                held_out=loss,
                probe=around(1 / step),
                to_base=paired_difference(loss, dict(base.by_image)),
                to_best=paired_difference(loss, dict(losses[20].by_image)),
                gap=ProbeGap(mean=0.01, standard_error=0.002),
            )
            for step, loss in losses.items()
        ),
        selected=Selection(
            requested="best", step=20, weights="trained", best_step=20, text="Step 20 is selected: it is."
        ),
        selected_weights=CheckpointWeights(
            step=20,
            epochs=1,
            samples=20,
            weights="trained",
            path=str(folder / "step-00000020"),
            sha256="ab" * 32,
            is_final=False,
        ),
        overfitting=Overfitting(
            conclusive=True, from_step=30, gap=None, text="Over-fitting from step 30: so."
        ),
        scores=Scores(
            clip=pair,
            cmmd_lora=Cmmd(value=None, images=(4, 4), status="refused", text="CMMD: refused"),
            omitted={"diversity": "Diversity: not measured"},
        ),
        memorisation=Memorisation(
            samples=4,
            flagged=1,
            limit=0.1,
            calibrated_on=8,
            pairs=(
                MemorisedPair(
                    image_path=str(folder / "sample.png"),
                    nearest="zorps/secret.png",
                    similarity=1.0,
                    correlation=1.0,
                    flagged=True,
                ),
            ),
            sheet_path=str(folder / "memorisation.png"),
            text="1 of 4 images are copies.",
        ),
    )


def test_report_metrics_all_have_labels_and_loss_ratio(tmp_path: Path):
    metrics = report_metrics(make_report(tmp_path))
    assert metrics.keys() == METRIC_LABELS.keys()
    assert metrics["loss_ratio"] == pytest.approx(0.25)
    only_loss = report_metrics(make_report(tmp_path, base_clip=None, lora_clip=None))
    assert only_loss.keys() == {"base_loss", "lora_loss", "loss_ratio"}


def test_change_since_compares_common_metrics(tmp_path: Path):
    write_report(make_report(tmp_path, base_clip=None, lora_clip=None), "demo", None)
    current = report_metrics(
        make_report(tmp_path, lora_loss=LossSummary(mean=0.08, by_timestep=LORA.by_timestep))
    )
    changes = change_since(tmp_path / "report.json", current)
    assert changes.keys() == {"base_loss", "lora_loss", "loss_ratio"}
    assert changes["lora_loss"] == pytest.approx(-0.02)
    assert changes["base_loss"] == 0
    assert change_since(None, current) == {}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a report\.json"):
        change_since(tmp_path / "other.json", current)


def test_metrics_table_has_changes_only_after_a_release(tmp_path: Path):
    assert "change" not in metrics_table(make_report(tmp_path))
    compared = metrics_table(make_report(tmp_path, change_since_release={"lora_loss": -0.02}))
    assert "| Eval loss, LoRA | 0.1 | -0.02 |" in compared
    assert {line.count("|") for line in compared.splitlines()} == {4}


def test_write_report_describes_the_measurement(tmp_path: Path):
    broken = (FailedItem(name="star", reason="black"),)
    report = make_report(tmp_path, broken_images=broken, eval_source="training images")
    write_report(report, "demo", "bundled:tiny-clip")
    text = (tmp_path / "report.md").read_text()
    assert "- star: black" in text
    assert "the LoRA was trained on" in text
    assert "bundled:tiny-clip" in text
    assert "(gallery.png)" in text
    assert "(loss_by_timestep.png)" in text
    assert "| 125 | 0.60000 | 0.15000 | -75.0% |" in text


def test_write_report_contains_no_local_path(tmp_path: Path):
    report = make_report(tmp_path)
    write_report(report, "demo", "bundled:tiny-clip")
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    assert str(tmp_path) not in (tmp_path / "report.md").read_text()
    data = portable_report(report, None)
    assert data == json.loads(json.dumps(data))
    assert data["images"] == [{"step": 40, "name": "star", "prompt": "a star", "seed": 1, "scale": 1.0}]


def test_write_report_of_checkpoints_publishes_no_path_and_no_training_image(tmp_path: Path):
    write_report(make_complete_report(tmp_path), "demo", "bundled:tiny-clip")
    published = (tmp_path / "report.json").read_text()
    assert str(tmp_path) not in published
    assert "secret.png" not in published
    content = json.loads(published)
    assert "pairs" not in content["memorisation"]
    assert (content["memorisation"]["flagged"], content["selected"]["step"]) == (1, 20)
    assert "path" not in content["selected_weights"]
    text = (tmp_path / "report.md").read_text()
    assert str(tmp_path) not in text
    for part in (
        "Step 20 is selected: it is.",
        "| step 30 | 0.25000 | -0.15 ± 0.006 | +0.05 ± 0.006 | 0.03333 | +0.01 ± 0.002 |",
        "Over-fitting from step 30: so.",
        "| CLIP score | 20 | 25 | +5 ± 1 |  |",
        "- Diversity: not measured.",
        "- CMMD: refused.",
        "1 of 4 images are copies.",
        "(memorisation.png)",
        "(loss_by_step.png)",
    ):
        assert part in text


def test_plot_losses_by_step_has_both_curves_and_the_range_of_overfitting(tmp_path: Path):
    report = make_complete_report(tmp_path)
    rows = [EvalRow(step=15, loss=around(0.25), probe=around(0.1))]
    for name, changes in (("marked", {}), ("plain", {"overfitting": None})):
        plot_losses_by_step(report.model_copy(update=changes), rows, tmp_path / f"{name}.png")
    with Image.open(tmp_path / "marked.png") as plot:
        marked = {colour for _, colour in plot.convert("RGB").getcolors(1 << 20) or []}
    with Image.open(tmp_path / "plain.png") as plot:
        plain = {colour for _, colour in plot.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x1F, 0x5F, 0xA8), (0xC4, 0x6A, 0x16)} <= marked & plain
    assert any(red - green > 20 and red - blue > 20 for red, green, blue in marked - plain)


def test_write_report_without_measurements_reports_it(tmp_path: Path):
    not_measured = {
        "base_loss": None,
        "lora_loss": None,
        "base_clip": None,
        "lora_clip": None,
        "loss_plot_path": None,
    }
    write_report(make_report(tmp_path, **not_measured), "demo", None)
    assert "Neither the eval loss nor the CLIP score" in (tmp_path / "report.md").read_text()


def test_plot_losses_writes_an_image_with_both_curves(tmp_path: Path):
    path = tmp_path / "plot.png"
    plot_losses(BASE, LORA, "LoRA", path)
    with Image.open(path) as plot:
        assert plot.width > 600
        colours = {colour for _, colour in plot.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x8A, 0x8A, 0x8A), (0x1F, 0x5F, 0xA8)} <= colours
