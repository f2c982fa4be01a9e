"""The demo over-trained on two of its images: it is stopped where the eval loss no longer falls, or its release is refused."""

import json
import shutil
from pathlib import Path

import dagster as dg
import pytest

from sdxl_pipeline.demo.demo_dataset import generate_if_requested
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
from tests.support.asset_graph import materialize

DEMO = Path(__file__).parents[2] / "projects" / "demo"

OVERTRAINED = {
    "max_train_steps": 250,
    "train_batch_size": 2,
    "learning_rate": 3e-3,
    "lora_rank": 32,
    "lr_warmup_steps": 5,
    "snr_gamma": None,
    "caption_dropout_probability": 0.0,
    "checkpoint_step_interval": 250,
    "validation_disable": True,
    "num_caption_samples": 6,
    "gallery_checkpoints": 0,
    "gallery_scales": [],
    "eval_timesteps": 8,
    "evaluation_checks": {"better_than_base": "warning"},
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The demo with two of its zorps as the only training images, and the unseen ones held out."""
    folder = Path(shutil.copytree(DEMO, tmp_path / "projects" / "overtrained", ignore=ignored))
    generate_if_requested(folder)
    (folder / "generate_data.json").unlink()
    for image in sorted((folder / "data" / "zorp").glob("*.png"))[2:]:
        image.unlink()
        image.with_suffix(".txt").unlink()
    datasets = json.loads((folder / "multidatabackend.json").read_text())
    datasets = [
        {**dataset, "probability": 1.0} if dataset["id"] == "zorp" else dataset
        for dataset in datasets
        if dataset["id"] != "world"
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(datasets))
    return folder


def ignored(folder: str, names: list[str]) -> set[str]:
    return {"data", "output"} & {*names}


def configure(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **OVERTRAINED, **changes}))


@pytest.mark.slow
def test_overtrained_lora_is_refused_as_memorised(instance: dg.DagsterInstance, project: Path) -> None:
    configure(project)
    with pytest.raises(dg.DagsterError, match="not_memorised"):
        materialize(instance, project)
    report_file = next((project / "output" / "evaluation").glob("*/report.finished.json"))
    report = EvaluationReport.model_validate_json(report_file.read_text())
    assert report.memorisation is not None
    assert report.memorisation.is_over_limit
    assert "are copies of a training image" in report.memorisation.text
    assert not (project / "output" / "release").exists()


@pytest.mark.slow
def test_overtraining_is_stopped_where_the_eval_loss_no_longer_falls(
    instance: dg.DagsterInstance, project: Path
) -> None:
    configure(project, eval_steps_interval=20, early_stopping_patience=2, num_caption_samples=0)
    lora = materialize(instance, project).output_for_node("overtrained__lora")
    assert lora.stopped_early is not None
    assert lora.stopped_early.best_step < lora.steps < OVERTRAINED["max_train_steps"]
    assert lora.planned_steps == OVERTRAINED["max_train_steps"]
