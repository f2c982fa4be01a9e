"""Where each stage of a project stands in the graph: its asset key, its group, the version of its code and settings."""

from typing import Any

import dagster as dg

from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.files.digest import digest_json

GPU_POOL = "gpu"
"""All device stages share this pool; dagster.yaml limits it to one at a time."""


def project_key(project: Project, stage: str) -> dg.AssetKey:
    """Key of a stage that a project has once: `<project>/<stage>`."""
    return dg.AssetKey([project.name, stage])


def dataset_key(project: Project, dataset: ImageDataset, stage: str) -> dg.AssetKey:
    """Key of a stage that each dataset has: `<project>/<dataset>/<stage>`."""
    return dg.AssetKey([project.name, dataset.asset_name, stage])


def version(code: str, settings: Any) -> str:
    """Code version of a stage: a change of its code or of the settings it reads makes it stale in the UI."""
    return f"{code}-{digest_json(settings)[:12]}"
