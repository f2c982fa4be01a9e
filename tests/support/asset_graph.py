"""Materializing assets of a test project, and a stage client that runs stages inside the test's process."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from accelerate.state import AcceleratorState
from pydantic import BaseModel

from resources.stage_client import LocalStageClient
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.definitions import build_definitions
from sdxl_pipeline.runtime.reporter import PlainReporter
from sdxl_pipeline.runtime.stage_runner import StopSignal

DATASET_STAGES = ("dataset", "aspect_buckets", "vae_latents", "text_embeds")


def stage_key(project: str, stage: str, dataset: str = "shapes") -> dg.AssetKey:
    """Return the key of a stage: of the dataset if each has it, else of the project."""
    return dg.AssetKey([project, f"{dataset}_{stage}" if stage in DATASET_STAGES else stage])


def metadata(result: dg.ExecuteInProcessResult, *key: str) -> dict[str, Any]:
    """Return the metadata of the asset `key` of a run."""
    event = result.asset_materializations_for_node("__".join(key))[0]
    return {name: value.value for name, value in event.metadata.items()}


class InProcessStageClient(LocalStageClient):
    """Runs a stage's main function in this process, which saves the import of torch in every run."""

    def run_stage(
        self,
        context: dg.AssetExecutionContext,
        stage: str,
        spec: BaseModel,
        manifest_type: type[Any],
        work_dir: Path,
        hardware: Hardware,
        environment: Mapping[str, str] | None = None,
    ) -> Any:
        """Run the stage on a copy of the spec from its JSON, and return the manifest likewise."""
        AcceleratorState._reset_state(reset_partial_state=True)  # keeps one mixed precision per process
        module = importlib.import_module(f"sdxl_pipeline.stages.{stage}")
        received = type(spec).model_validate_json(spec.model_dump_json())
        manifest = module.main(received, PlainReporter(), StopSignal())
        return manifest_type.model_validate_json(manifest.model_dump_json())


def materialize(
    instance: dg.DagsterInstance,
    folder: Path,
    *stages: str,
    run_config: dict[str, Any] | None = None,
    in_process: bool = True,
) -> dg.ExecuteInProcessResult:
    """Materialize the named stages of the project in `folder`, or all of them; in child processes like the product if asked to."""
    definitions = build_definitions(folder.parent)
    name = folder.name
    keys = [stage_key(name, stage) for stage in stages]
    resources = dict(definitions.resources or {})
    if in_process:
        resources["launcher"] = InProcessStageClient()
    return dg.materialize(
        list(definitions.assets or []),
        selection=dg.AssetSelection.assets(*keys) if keys else None,
        resources=resources,
        instance=instance,
        run_config=run_config,
    )
