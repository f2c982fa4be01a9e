"""Any finished run and any checkpoint can be evaluated and released, and a failed evaluation is not released."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.evaluation.history import NOT_PUSHED, read_history
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.specs import CheckpointWeights
from tests.conftest import draw_image
from tests.support.asset_graph import DATASET_STAGES, InProcessStageClient, materialize, metadata, stage_key

CONFIG = {
    "eval_holdout_share": 0,
    "evaluation_type": "none",
    "num_caption_samples": 0,
    "num_probe_images": 0,
    "num_eval_images": 2,
    "eval_timesteps": 2,
    "evaluation_checks": {"better_than_base": "warning"},
    "validation_disable": True,
    "max_train_steps": 2,
    "checkpoint_step_interval": 1,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 1,
}
WEIGHTS = "pytorch_lora_weights.safetensors"


def train(instance: dg.DagsterInstance, folder: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Train with overrides and return the folder of the run."""
    config = {"ops": {"small__lora": {"config": {"settings": dict(settings or {})}}}}
    result = materialize(instance, folder, "lora", run_config=config)
    return Path(metadata(result, "small", "lora")["weights"]).parent


def evaluate(instance: dg.DagsterInstance, folder: Path, **config: str) -> dict[str, Any]:
    result = materialize(
        instance, folder, "evaluation", run_config={"ops": {"small__evaluation": {"config": config}}}
    )
    return metadata(result, "small", "evaluation")


def release(instance: dg.DagsterInstance, folder: Path, **config: str) -> dict[str, Any]:
    result = materialize(
        instance, folder, "hub_release", run_config={"ops": {"small__hub_release": {"config": config}}}
    )
    return metadata(result, "small", "hub_release")


def lineage(released: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(released["folder"]) / "lineage.json").read_text())
    return content


@pytest.mark.slow
def test_finished_run_is_evaluated_and_released_by_its_identity(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=4, config=CONFIG)
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    older = train(instance, folder, {"learning_rate": 0.009})
    versions = json.loads((older / "data_versions.json").read_text())
    draw_image(folder / "data", 8)  # added images change neither the run nor its evaluation
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    current = train(instance, folder)
    assert evaluate(instance, folder)["run"].startswith(current.name)

    identity = evaluate(instance, folder, run=older.name)["run"]
    assert identity.startswith(older.name)
    assert identity.endswith("(not the current LoRA)")
    with pytest.raises(dg.Failure, match=f"evaluated run {older.name} is not the current LoRA") as error:
        release(instance, folder)
    assert "learning_rate: 0.009 instead of 0.001" in str(error.value.description)
    with pytest.raises(dg.Failure, match="is not the identity of the evaluated run"):
        release(instance, folder, promote=current.name)

    released = release(instance, folder, promote=older.name)
    assert released["run"] == identity
    assert (Path(released["folder"]) / WEIGHTS).read_bytes() == (older / WEIGHTS).read_bytes()
    content = lineage(released)
    assert content["training_identity"].startswith(older.name)
    assert content["overrides"] == {"learning_rate": {"configured": 0.001, "used": 0.009}}
    assert versions.items() <= content["data_versions"].items()

    rows = read_history(folder / "output")
    assert [row.run_identity[:16] for row in rows] == [current.name, older.name]
    assert [row.released for row in rows] == [None, NOT_PUSHED]
    assert "learning_rate: 0.001 -> 0.009" in rows[1].differs
    assert "images, captions or settings of the dataset shapes" in rows[1].differs

    (folder / "data" / "image_03.png").unlink()
    (folder / "data" / "image_03.txt").unlink()
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    with pytest.raises(dg.Failure, match=r"no longer contains: image_03\.png"):
        evaluate(instance, folder, run=older.name)


class SelectingStageClient(InProcessStageClient):
    """Selects the checkpoint of step 1, whatever the evaluation concludes."""

    def run_stage(
        self, context: dg.AssetExecutionContext, stage: str, spec: Any, *args: Any, **kwargs: Any
    ) -> Any:
        report = super().run_stage(context, stage, spec, *args, **kwargs)
        if not isinstance(spec, EvaluateSpec):
            return report
        first: CheckpointWeights = spec.checkpoints[0]
        assert [each.step for each in spec.checkpoints] == [1, 2]
        return report.model_copy(
            update={
                "run_identity": spec.lora.identity,
                "selected_weights": first,
                "step": first.step,
                "lora_sha256": first.sha256,
            }
        )


def test_selected_checkpoint_is_released_and_failed_checks_are_not(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=4, config=CONFIG)
    materialize(instance, folder, "base_model", *DATASET_STAGES, "training_set")
    run = train(instance, folder)
    with pytest.raises(dg.Failure, match=f"no finished run begins.*{run.name}"):
        evaluate(instance, folder, run="0" * 16)
    with pytest.raises(dg.Failure, match=r"checkpoint is 'newest'.*step-500"):
        evaluate(instance, folder, checkpoint="newest")
    definitions = build_definitions(folder.parent)
    result = dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(stage_key("small", "evaluation")),
        resources={**(definitions.resources or {}), "launcher": SelectingStageClient()},
        instance=instance,
    )
    formats = next(
        check for check in result.get_asset_check_evaluations() if check.check_name == "release_formats_valid"
    )
    assert formats.passed
    released = release(instance, folder)
    checkpoint = run / "checkpoints" / "step-00000001" / WEIGHTS
    assert (Path(released["folder"]) / WEIGHTS).read_bytes() == checkpoint.read_bytes()
    assert checkpoint.read_bytes() != (run / WEIGHTS).read_bytes()
    assert (Path(released["folder"]) / "small.safetensors").is_file()
    assert (lineage(released)["step"], lineage(released)["is_final"], released["step"]) == (1, False, 1)

    config = json.loads((folder / "config.json").read_text())
    later = {"model_card_note": "Written after the training.", "hub_model_id": "someone/later", "seed": 5}
    (folder / "config.json").write_text(json.dumps(config | later))
    files = Path(release(instance, folder)["folder"])
    assert "Written after the training." in (files / "README.md").read_text()
    settings = json.loads((files / "training_config.json").read_text())
    assert (settings["hub_model_id"], settings["seed"]) == ("someone/later", config.get("seed", 42))

    checks = {"better_than_base": "warning", "enough_eval_images": "blocking"}
    (folder / "config.json").write_text(json.dumps(config | {"evaluation_checks": checks}))
    with pytest.raises(dg.Failure, match="enough_eval_images: The eval loss is measured on images") as error:
        release(instance, folder)
    assert '"evaluation_checks": {"enough_eval_images": "warning"}' in str(error.value.description)
