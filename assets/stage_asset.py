"""The frame of the assets that a device stage makes: run it, show what it did, say what may go on."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

from assets.metadata import drop_none
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


def materialized(
    context: dg.AssetExecutionContext,
    launcher: LocalStageClient,
    stage: str,
    spec: EncodeLatentsSpec | EncodeTextSpec | EvaluateSpec,
    manifest_type: type[ManifestT],
    work_dir: Path,
    told: Callable[[ManifestT], str],
    data_version: Callable[[ManifestT], str],
    metadata: Callable[[ManifestT], dict[str, Any]],
    checked: Callable[[ManifestT], Sequence[dg.AssetCheckResult]],
) -> dg.MaterializeResult:
    """Run a stage on the hardware of its spec, and give its manifest as the asset's value.

    `told` is a line for the log; entries of `metadata` that are None are left out. Raises what `LocalStageClient.run` raises.
    """
    manifest = launcher.run(context, stage, spec, manifest_type, work_dir, spec.hardware)
    context.log.info(told(manifest))
    return dg.MaterializeResult(
        value=manifest,
        data_version=dg.DataVersion(data_version(manifest)),
        metadata=drop_none(metadata(manifest)),
        check_results=checked(manifest),
    )
