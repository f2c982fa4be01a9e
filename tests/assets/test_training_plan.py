"""The training plan asset: inconsistent counts fail before anything is encoded, and the plan matches the training."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.training_plan import PlannedDataset, plan_training
from tests.conftest import DATASET, draw_image
from tests.support.training_datasets import SETTINGS, SQUARE, WIDE, make_dataset

ENCODERS = ("vae_latents", "text_embeds")


def run(folder: Path, instance: dg.DagsterInstance, *stages: str) -> dg.ExecuteInProcessResult:
    """Materialize the stages of every dataset or of the project, with everything upstream of them."""
    definitions = build_definitions(folder.parent)
    graph = definitions.resolve_asset_graph()
    keys = [key for key in graph.get_all_asset_keys() if key.path[-1] in stages]
    return dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(*keys).upstream(),
        resources=dict(definitions.resources or {}),
        instance=instance,
        raise_on_error=False,
    )


def materialized_stages(result: dg.ExecuteInProcessResult) -> set[str]:
    names = {event.asset_key.path[-1] for event in result.get_asset_materialization_events()}
    assert any(name.endswith("_aspect_buckets") for name in names)
    return {stage for stage in (*ENCODERS, "lora") for name in names if name.endswith(stage)}


def failure_message(result: dg.ExecuteInProcessResult) -> str:
    (step,) = [event for event in result.all_events if event.is_step_failure]
    assert step.step_key == "small__training_plan"
    return str(step.step_failure_data.user_failure_data.description)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 9}, r"give 7 images an epoch, but one step takes 9"),
        (
            {"train_batch_size": 2, "gradient_accumulation_steps": 4},
            r"one step takes 8: train_batch_size 2 x 1 processes x gradient_accumulation_steps 4",
        ),
        (
            {
                "train_batch_size": 2,
                "gradient_accumulation_steps": 3,
                "max_train_steps": 0,
                "num_train_epochs": 2,
                "lr_warmup_steps": 100,
            },
            r"lr_warmup_steps is 100, but the run has only 3 steps.*8 batches in num_train_epochs 2.*Set it to at most 2",
        ),
    ],
)
def test_training_plan_inconsistent_counts_fail_before_encoding(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], config: dict[str, Any], message: str
) -> None:
    result = run(make_project(images=7, config=config), instance, "lora")
    assert not result.success
    assert re.search(message, failure_message(result))
    assert not materialized_stages(result)


def test_training_plan_datasets_are_counted_together_and_a_failure_blocks_all_encoders(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=0, config={"train_batch_size": 12, "eval_holdout_share": 0})
    for name, count in (("people", 5), ("things", 6)):
        for index in range(count):
            draw_image(folder / name, index)
    entries = [{**DATASET, "id": name, "instance_data_dir": name} for name in ("people", "things")]
    (folder / "multidatabackend.json").write_text(json.dumps(entries))
    result = run(folder, instance, "lora")
    assert "give 11 images an epoch, but one step takes 12" in failure_message(result)
    assert not materialized_stages(result)


def test_training_plan_metadata_counts_images_and_data_version_is_constant(
    instance: dg.DagsterInstance, make_project: Callable[..., Path]
) -> None:
    folder = make_project(images=6, config={"max_train_steps": 5})
    first = run(folder, instance, "training_plan")
    (event,) = first.asset_materializations_for_node("small__training_plan")
    table = str(event.metadata["datasets"].value)
    (eval_check,) = [
        check for check in first.get_asset_check_evaluations() if check.check_name == "enough_eval_images"
    ]
    assert (eval_check.passed, eval_check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert event.metadata["steps"].value == 5
    assert event.metadata["images_per_epoch"].value == 6
    assert "| shapes | 6 | 0 | 1 |" in table

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_train_steps": 6, "train_batch_size": 1}))
    second = run(folder, instance, "training_plan")
    (again,) = second.asset_materializations_for_node("small__training_plan")
    assert again.metadata["steps"].value == 6
    assert again.tags["dagster/data_version"] == event.tags["dagster/data_version"]


def plan_buckets(folder: Path, buckets: list[tuple[int, int]], processes: int = 1, **changes: Any) -> Any:
    dataset = make_dataset(folder, buckets=buckets)
    settings = TrainingSettings(**{"pretrained_model_name_or_path": "model", **SETTINGS, **changes})
    rows = pd.read_parquet(dataset.rows_path)
    planned = [PlannedDataset("shapes", rows, 0, 1.0)]
    return plan_training(planned, settings, processes, settings.allow_dataset_oversubscription)


def test_plan_training_bucket_of_one_image_is_partial_or_wrapped(tmp_path: Path) -> None:
    buckets = [SQUARE] * 7 + [WIDE]
    sizes = {"train_batch_size": 4, "max_train_steps": None, "num_train_epochs": 1}
    partial = plan_buckets(tmp_path / "a", buckets, **sizes)
    assert (partial.appearances, partial.images_per_epoch, partial.steps) == ({"shapes": (1, 1)}, 8, 3)
    wrap = plan_buckets(tmp_path / "b", buckets, bucket_fill="wrap", **sizes)
    assert (wrap.appearances, wrap.images_per_epoch, wrap.steps) == ({"shapes": (1, 4)}, 12, 3)
    with pytest.raises(UserError, match="x 3 processes"):
        plan_buckets(tmp_path / "c", buckets, processes=3, **sizes)
