"""The pattern of the assets that a device stage materializes: a subclass says what runs and what is recorded, the base class does it.

The functions of these assets yield the result instead of returning it: Dagster 1.13 rejects a returned `MaterializeResult[T]` of an asset
that has `check_specs`, and with the yielded one the type of the value stays checked.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import dagster as dg
from pydantic import BaseModel

from assets.event_log import user_errors_as_failures
from resources.stage_client import LocalStageClient
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, EncodeTextSpec, TrainSpec

SpecT = TypeVar("SpecT", bound=EncodeLatentsSpec | EncodeTextSpec | TrainSpec | EvaluateSpec)
ManifestT = TypeVar("ManifestT", bound=BaseModel)


class StageAsset(ABC, Generic[SpecT, ManifestT]):
    """One materialization of a device stage's asset: its fields are settings and inputs, the value is the stage's manifest."""

    stage: str
    """Module in `sdxl_pipeline.stages`."""
    manifest_type: type[ManifestT]
    work_dir: Path

    @abstractmethod
    def build_spec(self) -> SpecT:
        """Return the spec of the stage, which includes the hardware; write the tables that it refers to."""

    @cached_property
    def spec(self) -> SpecT:
        """Return the spec that the stage runs with."""
        return self.build_spec()

    def complete(self, manifest: ManifestT, /) -> ManifestT:
        """Return the asset's value: the manifest with what the stage cannot know."""
        return manifest

    @abstractmethod
    def summary(self, manifest: ManifestT, /) -> str:
        """Return one line for the log: what was done and what was reused."""

    @abstractmethod
    def data_version(self, manifest: ManifestT, /) -> str:
        """Return a digest of the result. If it changes, downstream assets are stale."""

    @abstractmethod
    def metadata(self, manifest: ManifestT, /) -> dict[str, Any]:
        """Return what the asset's page shows."""

    @abstractmethod
    def check_results(self, manifest: ManifestT, /) -> Sequence[dg.AssetCheckResult]:
        """Return a result of each of the asset's checks."""

    def record(self, manifest: ManifestT, results: Sequence[dg.AssetCheckResult], /) -> None:
        """Record a finished materialization outside of Dagster, before its metadata are built."""

    def tags(self, manifest: ManifestT, /) -> Mapping[str, str] | None:
        """Return tags of the materialization, if it has any."""
        return None

    def materialize(
        self,
        context: dg.AssetExecutionContext,
        client: LocalStageClient,
        environment: Mapping[str, str] | None = None,
    ) -> dg.MaterializeResult[ManifestT]:
        """Run the stage, with `environment` added to its process's.

        Raises what `LocalStageClient.run_stage` raises, and `dagster.Failure` for the library's errors that the user can fix.
        """
        with user_errors_as_failures():
            spec = self.spec
        manifest = client.run_stage(
            context, self.stage, spec, self.manifest_type, self.work_dir, spec.hardware, environment
        )
        with user_errors_as_failures():
            value = self.complete(manifest)
            context.log.info(self.summary(value))
            results = self.check_results(value)
            self.record(value, results)
            return dg.MaterializeResult(
                value=value,
                data_version=dg.DataVersion(self.data_version(value)),
                metadata=self.metadata(value),
                check_results=results,
                tags=self.tags(value),
            )
