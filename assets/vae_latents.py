"""The VAE latent cache of a dataset."""

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, project_key, version
from assets.checks import result_checks
from assets.metadata import latent_metadata
from assets.stage_asset import materialize_stage
from resources.hardware import HardwareProfile
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, LatentCache

CODE = "3"


def build_vae_latents(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_vae_latents`."""
    key = dataset_key(project, dataset, "vae_latents")

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "torch", device=True, dataset=dataset),
        ins={
            "model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel),
            "rows": dg.AssetIn(
                key=dataset_key(project, dataset, "aspect_buckets"), dagster_type=pd.DataFrame
            ),
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
        spec = EncodeLatentsSpec(
            base_model=model,
            hardware=profile,
            data_dir=str(storage.data_dir(dataset)),
            rows_path=str(storage.write_table(rows, work_dir, "rows")),
            store_root=str(storage.latent_store_root(dataset)),
            entries_path=str(work_dir / "entries.parquet"),
            sample_path=str(work_dir / "sample.png"),
            mode=dataset.latent_cache,
            trust_manifest="vae" in dataset.skipped_stages,
        )
        yield materialize_stage(
            context,
            launcher,
            "encode_latents",
            spec,
            LatentCache,
            work_dir,
            summary=lambda cache: (
                f"{cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred, {len(cache.failed)} failed."
            ),
            data_version=lambda cache: cache.digest,
            metadata=latent_metadata,
            checks=result_checks.check_latents,
        )

    return vae_latents
