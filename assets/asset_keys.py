"""Asset keys, attributes and code versions: what every stage of a project has in the same form."""

from typing import Any, Literal

import dagster as dg

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.files.digest import digest_json

GPU_POOL = "gpu"
"""Pool of all device stages; dagster.yaml limits it to one at a time."""


def project_key(project: Project, stage: str) -> dg.AssetKey:
    """Return the key of a stage that a project has once: `<project>/<stage>`."""
    return dg.AssetKey([project.name, stage])


def dataset_key(project: Project, dataset: ImageDataset, stage: str) -> dg.AssetKey:
    """Return the key of a stage that each dataset has: `<project>/<dataset>/<stage>`."""
    return dg.AssetKey([project.name, dataset.asset_name, stage])


def asset_attributes(
    project: Project, team: Literal["data", "training", "release"], *kinds: str, device: bool = False
) -> dict[str, Any]:
    """Return group, owner, kinds and tags of an asset as arguments of `dagster.asset`; with `device` also the GPU pool."""
    return {
        "group_name": project.name,
        "owners": [f"team:{team}"],
        "kinds": set(kinds),
        "tags": {"domain": team, "device": "gpu" if device else "cpu"},
        **({"pool": GPU_POOL} if device else {}),
    }


def version(code: str, settings: Any) -> str:
    """Return a stage's code version: a change of its code or of the settings it reads makes the asset stale in the UI."""
    return f"{code}-{digest_json(settings)[:12]}"
