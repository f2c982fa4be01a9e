"""The text embedding cache of a dataset, with the validation prompts."""

from collections.abc import Iterator

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, project_key, version
from assets.checks import result_checks
from assets.metadata import text_embed_metadata
from assets.stage_asset import materialize_stage
from resources.hardware import HardwareProfile
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import EncodeTextSpec, TextEmbedCache

CODE = "2"


def build_text_embeds(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_text_embeds`."""
    key = dataset_key(project, dataset, "text_embeds")
    cache_entry = project.text_embeds_of(dataset)
    windows = project.training.text_windows
    prompts = tuple(
        dict.fromkeys(text for prompt in project.prompts for text in (prompt.prompt, prompt.negative_prompt))
    )

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "torch", device=True, dataset=dataset),
        ins={
            "model": dg.AssetIn(key=project_key(project, "base_model"), dagster_type=ResolvedModel),
            "scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame),
        },
        deps=[project_key(project, "training_plan")],
        code_version=version(CODE, [prompts, project.text_cache_of(dataset), windows]),
        check_specs=[result_checks.CAPTIONS_NOT_TRUNCATED.spec(key)],
        description="Embeddings of every caption, of the validation prompts and of the empty prompt, by both text encoders.",
    )
    def text_embeds(
        context: dg.AssetExecutionContext,
        hardware: HardwareProfile,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        scanned: pd.DataFrame,
    ) -> Iterator[dg.MaterializeResult[TextEmbedCache]]:
        work_dir = storage.work_dir(project.name, dataset.asset_name, "text_embeds")
        kept = scanned[scanned["status"] == "kept"]
        captions = (
            kept[["path", "key", "captions"]].explode("captions").rename(columns={"captions": "caption"})
        )
        profile = resolve_hardware(project.training, hardware.hardware())
        spec = EncodeTextSpec(
            base_model=model,
            hardware=profile,
            captions_path=str(storage.write_table(captions, work_dir, "captions")),
            extra_prompts=prompts,
            store_root=str(storage.text_store_root(cache_entry)),
            entries_path=str(work_dir / "entries.parquet"),
            prompts_path=str(work_dir / "prompts.parquet"),
            shard_rows=cache_entry.write_batch_size,
            windows=windows,
            mode=project.text_cache_of(dataset),
            trust_manifest="text" in dataset.skipped_stages or "text" in cache_entry.skip_file_discovery,
        )
        yield materialize_stage(
            context,
            launcher,
            "encode_text",
            spec,
            TextEmbedCache,
            work_dir,
            summary=lambda cache: (
                f"{cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred of {cache.captions} texts."
            ),
            data_version=lambda cache: cache.digest,
            metadata=text_embed_metadata,
            checks=result_checks.check_text,
        )

    return text_embeds
