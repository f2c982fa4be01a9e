"""The report: figures that add up, a comparison with the last release, images that are linked where they lie, and no local path."""

import json
from pathlib import Path

import pytest
from PIL import Image

from sdxl_pipeline.evaluation.report import (
    FIGURE_NAMES,
    change_since,
    markdown_table,
    plot_losses,
    portable,
    report_figures,
    write_report,
)
from sdxl_pipeline.runtime.specs import (
    ClipSummary,
    EvaluationReport,
    FailedItem,
    LossSummary,
    ValidationImage,
)

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


def test_every_figure_has_a_name_and_the_ratio_is_one(tmp_path: Path):
    found = report_figures(make_report(tmp_path))
    assert found.keys() == FIGURE_NAMES.keys()
    assert found["loss_ratio"] == pytest.approx(0.25)
    only_loss = report_figures(make_report(tmp_path, base_clip=None, lora_clip=None))
    assert only_loss.keys() == {"base_loss", "lora_loss", "loss_ratio"}


def test_a_later_evaluation_is_compared_by_what_both_measured(tmp_path: Path):
    write_report(make_report(tmp_path, base_clip=None, lora_clip=None), "demo", None)
    now = report_figures(
        make_report(tmp_path, lora_loss=LossSummary(mean=0.08, by_timestep=LORA.by_timestep))
    )
    changes = change_since(tmp_path / "report.json", now)
    assert changes.keys() == {"base_loss", "lora_loss", "loss_ratio"}
    assert changes["lora_loss"] == pytest.approx(-0.02)
    assert changes["base_loss"] == 0
    assert change_since(None, now) == {}
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a report\.json"):
        change_since(tmp_path / "other.json", now)


def test_the_table_shows_changes_only_after_a_release(tmp_path: Path):
    assert "change" not in markdown_table(make_report(tmp_path))
    compared = markdown_table(make_report(tmp_path, change_since_release={"lora_loss": -0.02}))
    assert "| Eval loss, LoRA | 0.1 | -0.02 |" in compared
    assert {line.count("|") for line in compared.splitlines()} == {4}


def test_the_written_report_says_what_was_measured(tmp_path: Path):
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


def test_what_is_published_holds_no_path_of_this_machine(tmp_path: Path):
    report = make_report(tmp_path)
    write_report(report, "demo", "bundled:tiny-clip")
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    assert str(tmp_path) not in (tmp_path / "report.md").read_text()
    data = portable(report, None)
    assert data == json.loads(json.dumps(data))
    assert data["images"] == [{"step": 40, "name": "star", "prompt": "a star", "seed": 1}]


def test_a_report_without_measurements_says_so(tmp_path: Path):
    nothing = {
        "base_loss": None,
        "lora_loss": None,
        "base_clip": None,
        "lora_clip": None,
        "loss_plot_path": None,
    }
    write_report(make_report(tmp_path, **nothing), "demo", None)
    assert "Neither the eval loss nor the CLIP score" in (tmp_path / "report.md").read_text()


def test_the_plot_is_an_image(tmp_path: Path):
    path = tmp_path / "plot.png"
    plot_losses(BASE, LORA, "LoRA", path)
    with Image.open(path) as plot:
        assert plot.width > 600
        colours = {colour for _, colour in plot.convert("RGB").getcolors(1 << 20) or []}
    assert {(0x8A, 0x8A, 0x8A), (0x1F, 0x5F, 0xA8)} <= colours
