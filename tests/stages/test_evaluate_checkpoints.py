"""The evaluate stage measures every checkpoint once, selects one, and evaluates it instead of the final weights."""

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_pipeline.evaluation.checkpoint_images import CheckpointImages
from sdxl_pipeline.evaluation.checkpoint_losses import LOSSES_FOLDER
from sdxl_pipeline.evaluation.evaluator import comparable_rows
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport, LossSummary
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import FailedItem
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.stages.evaluate import main
from sdxl_pipeline.training.logging.run_logs import EvalRow, eval_loss_log
from tests.support.evaluation_specs import PROMPTS, make_checkpoints, make_evaluate_spec


class LogReporter(Reporter):
    """Keeps log lines and the names of finished tasks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.tasks: set[str] = set()

    def _show_log(self, message: str) -> None:
        self.lines.append(message)

    def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
        self.tasks.add(task)


def evaluate(spec: EvaluateSpec, **changes: object) -> tuple[EvaluationReport, LogReporter]:
    """Evaluate with changed settings."""
    reporter = LogReporter()
    settings = spec.settings.model_copy(update=changes)
    return main(spec.model_copy(update={"settings": settings}), reporter, StopSignal()), reporter


def make_spec(folder: Path, **changes: object) -> EvaluateSpec:
    """Return a spec of three checkpoints: 10 equals the base model, 20 is halfway, and 40 are the final weights."""
    options = {"evaluation_type": "none", "gallery_checkpoints": 0} | changes
    spec = make_evaluate_spec(folder, 0.1, PROMPTS[1:], **options)
    return spec.model_copy(update={"checkpoints": make_checkpoints(spec.lora, {10: 0.0, 20: 0.5})})


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateSpec, EvaluationReport, LogReporter]:
    spec = make_spec(tmp_path_factory.mktemp("series"))
    return (spec, *evaluate(spec))


def test_evaluate_checkpoints_measures_all_and_selects_the_lowest(series):
    _, report, reporter = series
    assert [loss.step for loss in report.checkpoints] == [10, 20, 40]
    first, second, last = report.checkpoints
    assert first.held_out == report.base_loss
    assert (first.probe, first.to_base.mean, first.gap.mean) == (report.base_probe, 0.0, 0.0)
    # random updates: each larger one is worse, so that the checkpoint that changes nothing is the best
    assert first.held_out.mean < second.held_out.mean < last.held_out.mean
    assert (report.selected.step, report.step, report.selected_weights.step) == (10, 10, 10)
    assert report.lora_loss == first.held_out
    assert report.lora_sha256 == first.sha256
    assert last.to_best.mean == pytest.approx(last.held_out.mean - first.held_out.mean)
    assert {image.step for image in report.images} == {0, 10}
    assert report.overfitting.text.startswith("Over-fitting cannot be determined: 2 held-out images")
    assert "eval loss, LoRA, step 20" in reporter.tasks
    assert "train probe, base model" in reporter.tasks
    assert report.selected.text in reporter.lines


def test_evaluate_files_are_in_the_folder_of_the_identity(series):
    spec, report, _ = series
    folder = Path(spec.output_dir) / report.identity[:16]
    for path in (report.report_path, report.html_path, report.gallery_path, report.loss_by_step_path):
        assert Path(path).is_relative_to(folder)
        assert Path(path).is_file()
    published = json.loads((folder / "report.json").read_text())
    assert str(spec.output_dir) not in json.dumps(published)
    assert [loss["step"] for loss in published["checkpoints"]] == [10, 20, 40]


def test_evaluate_requested_step_reads_the_losses_and_keeps_the_other_report(series):
    spec, first, _ = series
    stored = {path: path.stat().st_mtime_ns for path in (Path(spec.output_dir) / LOSSES_FOLDER).iterdir()}
    report, reporter = evaluate(spec, released_checkpoint="step-20")
    assert (report.step, report.selected.requested) == (20, "step-20")
    assert report.checkpoints == first.checkpoints
    assert report.base_loss == first.base_loss
    assert not {task for task in reporter.tasks if task.startswith(("eval loss", "train probe"))}
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    assert report.identity != first.identity
    again, _ = evaluate(spec)
    assert again == first.model_copy(update={"reused": True})


def test_evaluate_losses_measured_again_are_equal(series, tmp_path: Path):
    spec, first, _ = series
    report, reporter = evaluate(spec.model_copy(update={"output_dir": str(tmp_path)}))
    assert "eval loss, LoRA, step 20" in reporter.tasks
    assert (report.checkpoints, report.base_probe) == (first.checkpoints, first.base_probe)
    assert (report.selected, report.identity) == (first.selected, first.identity)


def test_evaluate_unknown_step_raises_before_measuring(series):
    spec, _, _ = series
    with pytest.raises(UserError, match=r'"step-30" has no checkpoint.*"step-10", "step-20", "step-40"'):
        evaluate(spec, released_checkpoint="step-30")


def test_evaluate_changed_checkpoint_is_left_out_and_named(tmp_path: Path):
    spec = make_spec(tmp_path)
    first = Path(spec.checkpoints[0].path)
    first.write_bytes(first.read_bytes()[:-4] + b"abcd")
    report, reporter = evaluate(spec)
    assert [loss.step for loss in report.checkpoints] == [20, 40]
    assert (report.step, report.selected.vetoes[0].step) == (20, 10)
    assert any(
        "step 10" in line and str(first) in line and "SHA-256 differs" in line for line in reporter.lines
    )
    with pytest.raises(UserError, match="SHA-256 differs"):
        evaluate(spec, released_checkpoint="step-10")
    # selected from stored losses, but unusable since
    second = Path(spec.checkpoints[1].path)
    second.unlink()
    report, _ = evaluate(spec)
    assert (report.step, report.reused) == (40, False)


def test_evaluate_without_held_out_images_has_no_probe_and_selects_the_last(tmp_path: Path):
    spec = make_spec(tmp_path)
    (dataset,) = spec.datasets
    pd.read_parquet(dataset.rows_path).assign(split="train").to_parquet(dataset.rows_path)
    report, _ = evaluate(spec)
    assert (report.eval_source, report.eval_images, report.base_probe) == ("training images", 6, None)
    assert {loss.gap for loss in report.checkpoints} == {None}  # the probe would be of the same images
    assert (report.step, report.selected.best_step, report.overfitting.conclusive) == (40, None, False)


def test_comparable_rows_are_of_the_released_weights_and_an_unquantized_base(series, tmp_path: Path):
    spec, _, _ = series
    loss = LossSummary(mean=0.1, by_timestep=((500, 0.1),))
    rows = [EvalRow(step=10, loss=loss), EvalRow(step=20, loss=loss, weights="ema")]
    eval_loss_log(tmp_path, 0).append(rows)
    spec = spec.model_copy(update={"lora": spec.lora.model_copy(update={"run_dir": str(tmp_path)})})
    assert comparable_rows(spec) == rows[:1]
    lora = spec.lora.model_copy(update={"released_weights": "ema"})
    assert comparable_rows(spec.model_copy(update={"lora": lora})) == rows[1:]
    hardware = spec.hardware.model_copy(update={"base_model_precision": "int8-torchao"})
    assert comparable_rows(spec.model_copy(update={"hardware": hardware})) == []


@pytest.mark.slow
def test_evaluate_diverged_checkpoint_is_never_selected(tmp_path: Path):
    spec = make_spec(tmp_path)
    tensors = load_file(spec.lora.weights_path)
    with safe_open(spec.lora.weights_path, framework="pt") as file:
        header = file.metadata()
    save_file({name: tensor * math.nan for name, tensor in tensors.items()}, spec.lora.weights_path, header)
    digest = sha256_file(Path(spec.lora.weights_path))
    *others, last = spec.checkpoints
    spec = spec.model_copy(
        update={
            "lora": spec.lora.model_copy(update={"weights_sha256": digest}),
            "checkpoints": (*others, last.model_copy(update={"sha256": digest})),
        }
    )
    report, _ = evaluate(spec)
    assert (report.step, [veto.step for veto in report.selected.vetoes]) == (10, [40])
    for requested in ("last", "step-40"):
        with pytest.raises(
            UserError, match=rf'"{requested}" cannot be evaluated: its eval loss is not finite'
        ):
            evaluate(spec, released_checkpoint=requested)
    assert evaluate(spec, released_checkpoint="step-20")[0].step == 20


def test_evaluate_broken_images_refuse_a_checkpoint(series, monkeypatch: pytest.MonkeyPatch):
    spec, _, _ = series
    refused = {10}
    monkeypatch.setattr(
        CheckpointImages,
        "broken",
        lambda self, column: (FailedItem(name="star", reason="black"),) if column.step in refused else (),
    )
    report, reporter = evaluate(spec, validation_seed=8)
    assert (report.step, report.selected.vetoed) == (20, False)
    assert any("step 10 is refused: its image star is broken (black)" in line for line in reporter.lines)
    refused = {10, 20, 40}
    report, _ = evaluate(spec, validation_seed=9)
    assert (report.step, report.selected.vetoed, report.broken_images[-1].name) == (40, True, "star")


@pytest.mark.slow
def test_evaluate_caption_samples_are_scored_and_compared_with_training_images(tmp_path: Path):
    spec = make_spec(
        tmp_path,
        evaluation_type="clip",
        num_caption_samples=4,
        gallery_checkpoints=1,
        gallery_scales=(0.5,),
    )
    (dataset,) = spec.datasets
    rows = pd.read_parquet(dataset.rows_path)
    Path(dataset.data_dir).mkdir()
    noise = np.random.default_rng(0)
    for row in rows.itertuples():
        pixels = noise.integers(0, 255, (row.source_h, row.source_w, 3), np.uint8)
        Image.fromarray(pixels).save(Path(dataset.data_dir) / row.path)
    report, reporter = evaluate(spec)
    assert (report.memorisation.samples, report.memorisation.flagged) == (4, 0)
    assert report.memorisation.calibrated_on == 4
    assert Path(report.memorisation.sheet_path).is_file()
    assert (report.scores.fidelity is None, report.scores.diversity is None) == (False, False)
    assert report.scores.cmmd_lora.status == "refused"
    assert report.scores.cmmd_lora.images == (4, 4)
    # step 10 changes nothing, so that every score equals that of the base model
    assert report.step == 10
    assert report.scores.fidelity.difference.mean == report.scores.diversity.difference.mean == 0.0
    assert (report.lora_clip is None) == ("clip" in report.scores.omitted)
    assert {
        "gallery, step 40",
        "gallery, step 10 × 0.5",
        "samples of training captions, base model",
    } <= reporter.tasks
    assert {image.step for image in report.images} == {0, 10}
    page = Path(report.html_path).read_text()
    assert "step 10 × 0.5" in page
    assert "step 40" in page
    assert all(Path(pair.image_path).is_file() for pair in report.memorisation.pairs)
    assert str(tmp_path) not in Path(report.report_path).with_suffix(".json").read_text()
