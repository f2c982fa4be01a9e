"""The text embedding cache of a dataset, with the prompts that are drawn during training."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
import pandas as pd

from assets import checks
from assets.keys import GPU_POOL, lane_key, project_key, version
from assets.show import names_list, present
from resources.hardware import HardwareProfile
from resources.launcher import LocalLauncher
from resources.storage import Storage
from sdxl_pipeline.project.datasets import ImageDataset
from sdxl_pipeline.project.precedence import resolve_hardware
from sdxl_pipeline.project.project import Project
from sdxl_pipeline.protocol.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.sdxl.base_model import ResolvedModel

CODE = "1"


def build_text_embeds(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """`<project>/<dataset>/text_embeds`."""
    key = lane_key(project, dataset, "text_embeds")
    cache_entry = project.text_embeds_of(dataset)
    prompts = tuple(
        dict.fromkeys(text for prompt in project.prompts for text in (prompt.prompt, prompt.negative_prompt))
    )

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"torch"},
        pool=GPU_POOL,
        ins={
            "model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel),
            "scanned": dg.AssetIn(key=lane_key(project, dataset, "dataset"), dagster_type=pd.DataFrame),
        },
        code_version=version(CODE, prompts),
        check_specs=checks.text_specs(key),
        description="Embeddings of every caption, of the validation prompts and of the empty prompt, by both text encoders.",
    )
    def text_embeds(
        context: dg.AssetExecutionContext,
        hardware: HardwareProfile,
        launcher: LocalLauncher,
        storage: Storage,
        model: ResolvedModel,
        scanned: pd.DataFrame,
    ) -> Iterator[Any]:
        work_dir = storage.work_dir(project.name, dataset.asset_name, "text_embeds")
        kept = scanned[scanned["status"] == "kept"]
        captions = (
            kept[["path", "key", "captions"]].explode("captions").rename(columns={"captions": "caption"})
        )
        profile = resolve_hardware(project.training, hardware.hardware())
        spec = EncodeTextSpec(
            base_model=model,
            hardware=profile,
            captions_path=str(storage.keep_table(captions, work_dir, "captions")),
            extra_prompts=prompts,
            store_root=str(storage.text_store_root(cache_entry)),
            entries_path=str(work_dir / "entries.parquet"),
            prompts_path=str(work_dir / "prompts.parquet"),
            shard_rows=cache_entry.write_batch_size,
        )
        cache = launcher.run(context, "encode_text", spec, TextEmbedCache, work_dir, profile)
        context.log.info(f"{cache.encoded} encoded, {cache.reused} reused of {cache.captions} texts.")
        yield dg.MaterializeResult(
            value=cache,
            data_version=dg.DataVersion(cache.digest),
            metadata=present(
                {
                    "captions": cache.captions,
                    "encoded": cache.encoded,
                    "reused": cache.reused,
                    "truncated": names_list(cache.truncated),
                    "captions_per_second": cache.captions_per_second,
                    "bytes": cache.bytes,
                    "seconds": cache.seconds,
                    "store": dg.MetadataValue.path(cache.store_root),
                }
            ),
            check_results=checks.check_text(cache),
        )

    return text_embeds
