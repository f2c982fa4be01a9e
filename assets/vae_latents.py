"""The VAE latent cache of a dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, model_input, project_key, version
from assets.checks import result_checks
from assets.metadata import drop_none, inline_image, markdown_table, names_list
from assets.stage_asset import StageAsset
from resources.hardware import HardwareProfile
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, LatentCache

CODE = "3"


@dataclass(frozen=True)
class VaeLatents(StageAsset[EncodeLatentsSpec, LatentCache]):
    """The encoding of a dataset's planned crops."""

    stage = "encode_latents"
    manifest_type = LatentCache
    dataset: ImageDataset
    storage: Storage
    work_dir: Path
    hardware: Hardware
    model: ResolvedModel
    rows: pd.DataFrame

    def build_spec(self) -> EncodeLatentsSpec:
        """Return the spec; the crop plan is written to a table."""
        return EncodeLatentsSpec(
            base_model=self.model,
            hardware=self.hardware,
            data_dir=str(self.storage.data_dir(self.dataset)),
            rows_path=str(self.storage.write_table(self.rows, self.work_dir, "rows")),
            store_root=str(self.storage.latent_store_root(self.dataset)),
            entries_path=str(self.work_dir / "entries.parquet"),
            sample_path=str(self.work_dir / "sample.png"),
            mode=self.dataset.latent_cache,
            trust_manifest="vae" in self.dataset.skipped_stages,
        )

    def summary(self, cache: LatentCache) -> str:
        """Return the numbers of crops encoded, reused, deferred and failed."""
        return f"{cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred, {len(cache.failed)} failed."

    def data_version(self, cache: LatentCache) -> str:
        """Return the digest of the entries."""
        return cache.digest

    def metadata(self, cache: LatentCache) -> dict[str, Any]:
        """Return counts, throughput and statistics."""
        statistics = markdown_table(
            ("channel", "mean", "standard deviation"),
            [
                (channel, mean, std)
                for channel, (mean, std) in enumerate(zip(cache.latent_mean, cache.latent_std, strict=True))
            ],
        )
        return drop_none(
            {
                "encoded": cache.encoded,
                "reused": cache.reused,
                "deferred": cache.deferred or None,
                "failed": names_list(f"{item.name}: {item.reason}" for item in cache.failed),
                "images_per_second": cache.images_per_second,
                "vae_utilization": cache.vae_busy,
                "bytes": cache.bytes,
                "seconds": cache.seconds,
                "scaled_latents": statistics if cache.measured else None,
                "scaled_latents_measured": f"{cache.measured} of {cache.planned} crops"
                if cache.measured
                else None,
                "sample": inline_image(cache.sample_path, "crops beside their decoded latents")
                if cache.sample_path
                else None,
                "store": dg.MetadataValue.path(cache.store_root),
            }
        )

    def check_results(self, cache: LatentCache) -> list[dg.AssetCheckResult]:
        """Return the results of `LATENT_CHECKS`."""
        return result_checks.check_latents(cache)


def build_vae_latents(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_vae_latents`."""
    key = dataset_key(project, dataset, "vae_latents")

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "torch", device=True, dataset=dataset),
        ins=model_input(project)
        | {
            "rows": dg.AssetIn(key=dataset_key(project, dataset, "aspect_buckets"), dagster_type=pd.DataFrame)
        },
        deps=[project_key(project, "training_plan")],
        code_version=version(CODE, [project.training.vae_dtype, dataset.latent_cache]),
        check_specs=[check.spec(key) for check in result_checks.LATENT_CHECKS],
        description="Posterior mean and log-variance of every planned crop; entries already in the store are reused.",
    )
    def vae_latents(
        context: dg.AssetExecutionContext,
        hardware: HardwareProfile,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        rows: pd.DataFrame,
    ) -> Iterator[dg.MaterializeResult[LatentCache]]:
        work_dir = storage.work_dir(project.name, dataset.asset_name, "vae_latents")
        profile = resolve_hardware(project.training, hardware.hardware())
        latents = VaeLatents(dataset, storage, work_dir, profile, model, rows)
        yield latents.materialize(context, launcher)

    return vae_latents
