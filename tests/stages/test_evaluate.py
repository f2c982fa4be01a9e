"""The evaluate stage loads the exported file with diffusers, is deterministic, reuses reports, and stops on request."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_pipeline.evaluation.evaluation_identity import evaluation_identity
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.evaluate import main
from tests.support.evaluation_specs import make_evaluate_spec
from tests.support.processes import DEAD_PID


def evaluate(spec: EvaluateSpec) -> EvaluationReport:
    return main(spec, Reporter(), StopSignal())


def pixels(report: EvaluationReport, name: str, step: int) -> np.ndarray:
    (path,) = [image.path for image in report.images if image.name == name and image.step == step]
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateSpec, EvaluationReport]:
    spec = make_evaluate_spec(tmp_path_factory.mktemp("changed"), scale=0.1)
    return spec, evaluate(spec)


def test_evaluate_zero_lora_equals_base_model(tmp_path: Path):
    report = evaluate(make_evaluate_spec(tmp_path, scale=0.0, evaluation_type="none"))
    assert report.lora_loss == report.base_loss
    assert np.array_equal(pixels(report, "star", 0), pixels(report, "star", 40))
    assert report.base_clip is None
    assert report.lora_clip is None


def test_evaluate_nonzero_lora_changes_loss_and_images(changed):
    _, report = changed
    assert report.lora_loss is not None
    assert report.base_loss is not None
    assert all(
        a != b for a, b in zip(report.lora_loss.by_timestep, report.base_loss.by_timestep, strict=True)
    )
    assert not np.array_equal(pixels(report, "star", 0), pixels(report, "star", 40))
    assert (report.eval_source, report.eval_images) == ("held-out share", 2)
    assert {image.name for image in report.images} == {"circle", "star"}
    assert report.lora_clip is not None
    assert 0 <= report.lora_clip.min <= report.lora_clip.mean <= report.lora_clip.max <= 100


def test_evaluate_repeated_is_identical(changed, tmp_path: Path):
    spec, report = changed
    release = Path(report.report_path).with_suffix(".json")
    update = {"output_dir": str(tmp_path), "previous_report_path": str(release)}
    again = evaluate(spec.model_copy(update=update))
    assert not again.reused
    for metric in ("base_loss", "lora_loss", "base_clip", "lora_clip", "identity"):
        assert getattr(again, metric) == getattr(report, metric)
    assert np.array_equal(pixels(again, "star", 40), pixels(report, "star", 40))
    assert set(again.change_since_release.values()) == {0.0}
    assert "lora_clip_mean" in again.change_since_release


@pytest.mark.slow
def test_evaluate_same_identity_is_reused_if_images_exist(tmp_path: Path):
    spec = make_evaluate_spec(tmp_path, scale=0.1, evaluation_type="none")
    first = evaluate(spec)
    leftover = Path(spec.output_dir) / "images" / f".00.{DEAD_PID}-0123abcd.tmp.png"
    in_use = leftover.with_name(f".00.{os.getpid()}-0123abcd.tmp.png")
    for path in (leftover, in_use):
        path.write_bytes(b"half")
    second = evaluate(spec)
    assert (leftover.exists(), in_use.exists()) == (False, True)
    assert second == first.model_copy(update={"reused": True})
    settings = spec.settings.model_copy(update={"validation_guidance": 2.0})
    assert not evaluate(spec.model_copy(update={"settings": settings})).reused
    third = evaluate(spec)
    assert not third.reused
    Path(third.gallery_path).unlink()
    assert not evaluate(spec).reused


@pytest.mark.slow
def test_evaluate_renamed_files_keep_identity_and_losses(tmp_path: Path):
    spec = make_evaluate_spec(tmp_path, scale=0.1, evaluation_type="none")
    before = evaluate(spec)
    (dataset,) = spec.datasets
    for table in (dataset.rows_path, dataset.latents.entries_path, dataset.text_embeds.entries_path):
        original = pd.read_parquet(table)
        renamed = original.assign(path=[f"moved/{ord('z') - ord(path[0])}.png" for path in original["path"]])
        renamed.sort_values("path").to_parquet(table)
    assert evaluation_identity(spec) == before.identity
    again = evaluate(spec.model_copy(update={"output_dir": str(tmp_path / "again")}))
    assert not again.reused
    assert (again.base_loss, again.lora_loss) == (before.base_loss, before.lora_loss)


def test_evaluate_report_paths_exist(changed):
    _, report = changed
    for path in (report.gallery_path, report.loss_plot_path, *(image.path for image in report.images)):
        with Image.open(path) as opened:
            opened.verify()
    assert Path(report.report_path).read_text().startswith("# Evaluation of")
    metrics = json.loads(Path(report.report_path).with_suffix(".json").read_text())["figures"]
    assert metrics["lora_loss"] == report.lora_loss.mean


def test_evaluate_without_eval_loss_and_prompts_uses_captions(tmp_path: Path):
    report = evaluate(
        make_evaluate_spec(tmp_path, prompts=(), eval_loss_disable=True, evaluation_type="none")
    )
    assert report.base_loss is report.lora_loss is report.loss_plot_path is None
    assert {image.prompt for image in report.images} == {"shapes 2 0", "shapes 4 0"}


def test_evaluate_changed_or_missing_weights_raises(changed, tmp_path: Path):
    spec, _ = changed
    tensors = load_file(spec.lora.weights_path)
    name = next(iter(tensors))
    other = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(tensors | {name: tensors[name] + 1}, other)
    lora = spec.lora.model_copy(update={"weights_path": str(other)})
    with pytest.raises(UserError, match="SHA-256 differs"):
        evaluate(spec.model_copy(update={"lora": lora}))
    missing = spec.lora.model_copy(update={"weights_path": str(tmp_path / "missing.safetensors")})
    with pytest.raises(UserError, match="does not exist"):
        evaluate(spec.model_copy(update={"lora": missing}))


def test_evaluate_incomplete_weights_raises(changed, tmp_path: Path):
    """Diffusers would only warn and evaluate another LoRA than the trained one."""
    spec, _ = changed
    tensors = load_file(spec.lora.weights_path)
    incomplete = tmp_path / "pytorch_lora_weights.safetensors"
    removed = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, incomplete)
    update = {"weights_path": str(incomplete), "weights_sha256": sha256_file(incomplete)}
    with pytest.raises(UserError, match="does not load completely"):
        evaluate(spec.model_copy(update={"lora": spec.lora.model_copy(update=update)}))


def test_evaluate_stop_requested_raises(changed, tmp_path: Path):
    spec, _ = changed
    stop = StopSignal()
    stop.request()
    with pytest.raises(StageStopped):
        main(spec.model_copy(update={"output_dir": str(tmp_path)}), Reporter(), stop)


@pytest.mark.slow
def test_evaluate_program_writes_manifest(changed, tmp_path: Path):
    spec, report = changed
    copied = spec.model_copy(update={"output_dir": str(tmp_path / "output")})
    (tmp_path / "spec.json").write_text(copied.model_dump_json())
    command = [sys.executable, "-m", "sdxl_pipeline.stages.evaluate", str(tmp_path / "spec.json")]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert completed.returncode == 0, completed.stderr
    manifest = EvaluationReport.model_validate_json((tmp_path / "manifest.json").read_text())
    assert manifest.lora_loss == report.lora_loss
    assert manifest.identity == report.identity
    assert "eval loss, LoRA: 8 of 8 pairs (100 %)" in completed.stdout
