"""What the page of `evaluation` shows of a report and of the history."""

from pathlib import Path

from PIL import Image

from assets.evaluation_metadata import MAX_HISTORY, history_table, report_metadata
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    Cmmd,
    HistoryRow,
    LossSummary,
    Memorisation,
    Overfitting,
    PairedDifference,
    ProbeGap,
    ScorePair,
    Scores,
    Selection,
)
from tests.evaluation.test_report import make_report

DIFFERENCE = PairedDifference(images=5, mean=-0.3, standard_error=0.01)
GAP = ProbeGap(mean=0.0213, standard_error=0.0045)


def make_full_report(folder: Path):
    for name in ("gallery.png", "loss_by_timestep.png", "pairs.png", "loss_by_step.png"):
        Image.new("RGB", (8, 8), "red").save(folder / name)
    loss = LossSummary(mean=0.125, by_timestep=())
    checkpoints = tuple(
        CheckpointLoss(
            step=step, weights="trained", sha256="0", held_out=loss, probe=loss, to_base=DIFFERENCE, gap=GAP
        )
        for step in (20, 40)
    )
    return make_report(
        folder,
        run_identity="a" * 64,
        step=40,
        checkpoints=checkpoints,
        selected=Selection(
            requested="best", step=40, weights="trained", best_step=40, text="Step 40 is the best."
        ),
        overfitting=Overfitting(conclusive=True, from_step=60, gap=GAP, text="Over-fitting from step 60."),
        memorisation=Memorisation(
            samples=16,
            flagged=1,
            limit=0.1,
            calibrated_on=40,
            pairs=(),
            sheet_path=str(folder / "pairs.png"),
            text="1 of 16 images is a copy.",
        ),
        scores=Scores(
            fidelity=ScorePair(base=0.31, lora=0.62, difference=DIFFERENCE, ceiling=0.8),
            cmmd_lora=Cmmd(value=None, images=(8, 40), status="refused", text="Too few images."),
            omitted={"clip": "The model does not know these images."},
            notes={"fidelity": "DINOv2"},
        ),
        html_path=str(folder / "report.html"),
        loss_by_step_path=str(folder / "loss_by_step.png"),
    )


def test_report_metadata_shows_selection_scores_and_checkpoints(tmp_path: Path) -> None:
    shown = report_metadata(make_full_report(tmp_path), is_current=True)
    assert shown["run"] == "a" * 64
    assert shown["selection"] == "Step 40 is the best."
    assert shown["overfitting"] == "Over-fitting from step 60."
    assert shown["memorisation"] == "1 of 16 images is a copy."
    assert shown["memorised_pairs"].value.startswith("![")
    assert shown["report_page"].value == (tmp_path / "report.html").as_uri()
    scores = shown["scores"].value
    assert "| fidelity | 0.31 | 0.62 |" in scores
    assert "| 0.8 | DINOv2 |" in scores
    assert "Too few images." in scores
    assert "The model does not know these images." in scores
    lines = shown["checkpoints"].value.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 20", "| 40"]
    assert [line.endswith("| yes |") for line in lines] == [False, True]
    assert "+0.0213 ± 0.0045" in lines[1]


def test_report_metadata_of_another_run_and_without_measurements(tmp_path: Path) -> None:
    report = make_full_report(tmp_path).model_copy(
        update={"scores": None, "memorisation": None, "checkpoints": (), "html_path": None, "base_clip": None}
    )
    shown = report_metadata(report, is_current=False)
    assert shown["run"] == "a" * 64 + " (not the current LoRA)"
    assert not {"scores", "memorisation", "memorised_pairs", "checkpoints", "report_page"} & shown.keys()


def test_history_table_has_the_latest_rows_first(tmp_path: Path) -> None:
    rows = [
        HistoryRow(
            identity=f"{index}",
            run_identity=f"{index:016x}",
            date="2026-03-01T12:30:00+00:00",
            step=index,
            differs=("learning_rate: 0.1 -> 0.2",),
            base_loss=None,
            lora_loss=0.125,
            difference=None,
            gap=None,
            scores={"clip": 20.25},
            verdict=("images_valid",) if index else (),
        )
        for index in range(MAX_HISTORY + 5)
    ]
    lines = history_table(rows).value.splitlines()[2:]
    assert len(lines) == MAX_HISTORY
    assert lines[0].startswith(
        f"| 2026-03-01 12:30 | {MAX_HISTORY + 4:016x} | {MAX_HISTORY + 4} |  | 0.125 |"
    )
    assert "| clip 20.25 | images_valid |  | learning_rate: 0.1 -> 0.2 |" in lines[0]
    assert "| none |" in history_table(rows[:1]).value
