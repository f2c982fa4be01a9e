"""The VAE latent cache of a dataset."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import GPU_POOL, dataset_key, project_key, version
from assets.checks import result_checks
from assets.metadata import inline_image, markdown_table, names_list
from assets.stage_asset import materialized
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
    """`<project>/<dataset>/vae_latents`."""
    key = dataset_key(project, dataset, "vae_latents")

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"torch"},
        pool=GPU_POOL,
        ins={
            "model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel),
            "rows": dg.AssetIn(
                key=dataset_key(project, dataset, "aspect_buckets"), dagster_type=pd.DataFrame
            ),
        },
        deps=[project_key(project, "training_plan")],
        code_version=version(CODE, [project.training.vae_dtype, dataset.latent_cache]),
        check_specs=result_checks.latent_specs(key),
        description="Posterior mean and log-variance of every planned crop; what is in the store already is not encoded again.",
    )
    def vae_latents(
        context: dg.AssetExecutionContext,
        hardware: HardwareProfile,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        rows: pd.DataFrame,
    ) -> Iterator[Any]:
        work_dir = storage.work_dir(project.name, dataset.asset_name, "vae_latents")
        profile = resolve_hardware(project.training, hardware.hardware())
        spec = EncodeLatentsSpec(
            base_model=model,
            hardware=profile,
            data_dir=str(storage.data_dir(dataset)),
            rows_path=str(storage.keep_table(rows, work_dir, "rows")),
            store_root=str(storage.latent_store_root(dataset)),
            entries_path=str(work_dir / "entries.parquet"),
            sample_path=str(work_dir / "sample.png"),
            mode=dataset.latent_cache,
            trust_recorded="vae" in dataset.skipped_stages,
        )
        yield materialized(
            context,
            launcher,
            "encode_latents",
            spec,
            LatentCache,
            work_dir,
            told=lambda cache: (
                f"{cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred, {len(cache.failed)} failed."
            ),
            data_version=lambda cache: cache.digest,
            metadata=_metadata,
            checked=result_checks.check_latents,
        )

    return vae_latents


def _metadata(cache: LatentCache) -> dict[str, Any]:
    channels = range(len(cache.latent_mean))
    scaled_latents = markdown_table(
        ("channel", "mean", "standard deviation"),
        [(channel, cache.latent_mean[channel], cache.latent_std[channel]) for channel in channels],
    )
    return {
        "encoded": cache.encoded,
        "reused": cache.reused,
        "deferred": cache.deferred or None,
        "failed": names_list(f"{item.name}: {item.reason}" for item in cache.failed),
        "images_per_second": cache.images_per_second,
        "vae_busy": cache.vae_busy,
        "bytes": cache.bytes,
        "seconds": cache.seconds,
        "scaled_latents": scaled_latents if cache.measured else None,
        "scaled_latents_of": f"{cache.measured} of {cache.planned} crops" if cache.measured else None,
        "sample": inline_image(cache.sample_path, "crops beside their decoded latents")
        if cache.sample_path
        else None,
        "store": dg.MetadataValue.path(cache.store_root),
    }
