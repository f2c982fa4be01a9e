"""The text embedding cache of a dataset, with the validation prompts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from assets.asset_keys import asset_attributes, dataset_key, model_input, project_key, version
from assets.checks import result_checks
from assets.metadata import drop_none, names_list
from assets.stage_asset import StageAsset
from resources.hardware import HardwareProfile
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import EncodeTextSpec, TextEmbedCache

CODE = "2"


@dataclass(frozen=True)
class TextEmbeds(StageAsset[EncodeTextSpec, TextEmbedCache]):
    """The encoding of a dataset's captions and of the project's prompts."""

    stage = "encode_text"
    manifest_type = TextEmbedCache
    project: Project
    dataset: ImageDataset
    storage: Storage
    work_dir: Path
    hardware: Hardware
    model: ResolvedModel
    scanned: pd.DataFrame

    def build_spec(self) -> EncodeTextSpec:
        """Return the spec; the captions are written to a table, one row per image and caption."""
        kept = self.scanned[self.scanned["status"] == "kept"]
        captions = kept[["path", "key", "captions"]].explode("captions")
        captions = captions.rename(columns={"captions": "caption"})
        cache_entry = self.project.text_embeds_of(self.dataset)
        return EncodeTextSpec(
            base_model=self.model,
            hardware=self.hardware,
            captions_path=str(self.storage.write_table(captions, self.work_dir, "captions")),
            extra_prompts=prompts_to_encode(self.project),
            store_root=str(self.storage.text_store_root(cache_entry)),
            entries_path=str(self.work_dir / "entries.parquet"),
            prompts_path=str(self.work_dir / "prompts.parquet"),
            shard_rows=cache_entry.write_batch_size,
            windows=self.project.training.text_windows,
            mode=self.project.text_cache_of(self.dataset),
            trust_manifest="text" in self.dataset.skipped_stages or "text" in cache_entry.skip_file_discovery,
        )

    def summary(self, cache: TextEmbedCache) -> str:
        """Return the numbers of texts encoded, reused and deferred."""
        return f"{cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred of {cache.captions} texts."

    def data_version(self, cache: TextEmbedCache) -> str:
        """Return the digest of the entries."""
        return cache.digest

    def metadata(self, cache: TextEmbedCache) -> dict[str, Any]:
        """Return counts, throughput and truncated captions."""
        truncated = [
            f"{caption} **loses:** {tail}"
            for caption, tail in zip(cache.truncated, cache.truncated_tails, strict=True)
        ]
        return drop_none(
            {
                "captions": cache.captions,
                "encoded": cache.encoded,
                "reused": cache.reused,
                "deferred": cache.deferred or None,
                "truncated_count": cache.truncated_count,
                "truncated": names_list(truncated),
                "windows_of_77_tokens": cache.windows,
                "captions_per_second": cache.captions_per_second,
                "bytes": cache.bytes,
                "seconds": cache.seconds,
                "store": dg.MetadataValue.path(cache.store_root),
            }
        )

    def check_results(self, cache: TextEmbedCache) -> list[dg.AssetCheckResult]:
        """Return the result of `CAPTIONS_NOT_TRUNCATED`."""
        return result_checks.check_text(cache)


def prompts_to_encode(project: Project) -> tuple[str, ...]:
    """Return the project's prompts and negative prompts, each once."""
    texts = (text for prompt in project.prompts for text in (prompt.prompt, prompt.negative_prompt))
    return tuple(dict.fromkeys(texts))


def build_text_embeds(project: Project, dataset: ImageDataset) -> dg.AssetsDefinition:
    """Return `<project>/<dataset>_text_embeds`."""
    key = dataset_key(project, dataset, "text_embeds")
    settings_read = [
        prompts_to_encode(project),
        project.text_cache_of(dataset),
        project.training.text_windows,
    ]

    @dg.asset(
        key=key,
        **asset_attributes(project, "data", "torch", device=True, dataset=dataset),
        ins=model_input(project)
        | {"scanned": dg.AssetIn(key=dataset_key(project, dataset, "dataset"), dagster_type=pd.DataFrame)},
        deps=[project_key(project, "training_plan")],
        code_version=version(CODE, settings_read),
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
        profile = resolve_hardware(project.training, hardware.hardware())
        embeds = TextEmbeds(project, dataset, storage, work_dir, profile, model, scanned)
        yield embeds.materialize(context, launcher)

    return text_embeds
