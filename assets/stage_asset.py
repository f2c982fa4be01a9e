"""The common part of assets that a device stage materializes: run the stage, log it, and return value, metadata and check results."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from resources.stage_client import LocalStageClient
from sdxl_pipeline.runtime.specs import (
    EncodeLatentsSpec,
    EncodeTextSpec,
    EvaluateSpec,
    EvaluationReport,
    LatentCache,
    TextEmbedCache,
)

ManifestT = TypeVar("ManifestT", LatentCache, TextEmbedCache, EvaluationReport)


def materialize_stage(
    context: dg.AssetExecutionContext,
    launcher: LocalStageClient,
    stage: str,
    spec: EncodeLatentsSpec | EncodeTextSpec | EvaluateSpec,
    manifest_type: type[ManifestT],
    work_dir: Path,
    summary: Callable[[ManifestT], str],
    data_version: Callable[[ManifestT], str],
    metadata: Callable[[ManifestT], dict[str, Any]],
    checks: Callable[[ManifestT], Sequence[dg.AssetCheckResult]],
) -> dg.MaterializeResult[ManifestT]:
    """Run a stage on the hardware of its spec and return its manifest as the asset's value.

    `summary` is a line for the log. Raises what `LocalStageClient.run_stage` raises.
    """
    manifest = launcher.run_stage(context, stage, spec, manifest_type, work_dir, spec.hardware)
    context.log.info(summary(manifest))
    return dg.MaterializeResult(
        value=manifest,
        data_version=dg.DataVersion(data_version(manifest)),
        metadata=metadata(manifest),
        check_results=checks(manifest),
    )
