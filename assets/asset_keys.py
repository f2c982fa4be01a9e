"""Asset keys, inputs, attributes and code versions: what every stage of a project has in the same form."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import dagster as dg

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.problems import Problem, ProjectError
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import TrainingSet

GPU_POOL = "gpu"
"""Pool of all device stages; dagster.yaml limits it to one at a time."""
MAX_TAG_LENGTH = 63
"""Longest value of a tag that Dagster accepts."""


def project_key(project: Project, stage: str) -> dg.AssetKey:
    """Return the key of a stage that a project has once: `<project>/<stage>`."""
    return dg.AssetKey([project.name, stage])


def dataset_key(project: Project, dataset: ImageDataset, stage: str) -> dg.AssetKey:
    """Return the key of a stage that each dataset has: `<project>/<dataset>_<stage>`.

    The UI's graph shows only the last component, so that is where the dataset's name must be.
    """
    return dg.AssetKey([project.name, dataset.stage_name(stage)])


def require_distinct_keys(project: Project, keys: Iterable[dg.AssetKey]) -> None:
    """Raise ProjectError if two assets of the project have one key, which Dagster would report for all projects at once."""
    datasets = (*project.datasets, *project.mask_datasets)
    repeated = [key for key, count in Counter(keys).items() if count > 1]
    problems = [
        Problem(
            Path(str(project.training.data_backend_config)),
            f'"{dataset.id}".id',
            dataset.id,
            f"its asset would be named {key.to_user_string()}, like another asset of the project",
            "give the dataset another id, for example with a number at its end",
        )
        for key in repeated
        for dataset in datasets
        if key.path[-1].startswith(f"{dataset.asset_name}_")
    ]
    if problems:
        raise ProjectError(problems)


def model_input(project: Project) -> dict[str, dg.AssetIn]:
    """Return the base model as an input named `model`."""
    return {"model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel)}


def training_set_input(project: Project) -> dict[str, dg.AssetIn]:
    """Return the training set as an input named `training_set`."""
    return {"training_set": dg.AssetIn(key=project_key(project, "training_set"), dagster_type=TrainingSet)}


def asset_attributes(
    project: Project,
    team: Literal["data", "training", "release"],
    *kinds: str,
    device: bool = False,
    dataset: ImageDataset | None = None,
) -> dict[str, Any]:
    """Return group, owner, kinds and tags of an asset as arguments of `dagster.asset`.

    With `device` also the GPU pool; with `dataset` a tag by which a dataset's assets are selected, `tag:dataset=<name>`.
    """
    tags = {"domain": team, "device": "gpu" if device else "cpu"}
    if dataset is not None:
        tags["dataset"] = dataset.asset_name[:MAX_TAG_LENGTH]
    return {
        "group_name": project.name,
        "owners": [f"team:{team}"],
        "kinds": set(kinds),
        "tags": tags,
        **({"pool": GPU_POOL} if device else {}),
    }


def version(code: str, settings: Any) -> str:
    """Return a stage's code version: a change of its code or of the settings it reads makes the asset stale in the UI."""
    return f"{code}-{digest_json(settings)[:12]}"
