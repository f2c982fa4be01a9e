"""The base model: where its files lie, which revision they are, what they digest to."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets.asset_keys import project_key, version
from assets.errors import user_errors_as_failures
from assets.metadata import drop_none, markdown_table
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.evaluation.scoring_model import scoring_model_folder
from sdxl_pipeline.models.base_model import resolve_base_model
from sdxl_pipeline.models.tiny_autoencoder import tiny_autoencoder_folder

CODE = "1"


def build_base_model(project: Project) -> dg.AssetsDefinition:
    """`<project>/base_model`; its data version is the digest of the files, so a re-download changes nothing."""
    settings = project.training

    @dg.asset(
        key=project_key(project, "base_model"),
        group_name=project.name,
        kinds={"huggingface"},
        code_version=version(
            CODE,
            [
                settings.pretrained_model_name_or_path,
                settings.pretrained_vae_model_name_or_path,
                settings.model_flavour,
                settings.revision,
            ],
        ),
        description="The SDXL model that is fine-tuned: downloaded when it is a Hub id, and digested per component.",
    )
    def base_model(context: dg.AssetExecutionContext, storage: Storage) -> Iterator[Any]:
        with user_errors_as_failures():
            model = resolve_base_model(settings, project.folder, cache_dir=storage.work_dir("base_models"))
            # Found or fetched now: that it cannot be had must not turn out after the training.
            scores = settings.evaluation_type == "clip"
            scoring_model = str(scoring_model_folder(settings, model)) if scores else None
            previews = settings.validation_preview
            preview_model = str(tiny_autoencoder_folder(settings, model)) if previews else None
        context.log.info(f"{model.source}: {model.path}, revision {model.revision or 'local files'}")
        yield dg.MaterializeResult(
            value=model,
            data_version=dg.DataVersion(model.digest),
            metadata=drop_none(
                {
                    "source": model.source,
                    "path": dg.MetadataValue.path(model.path),
                    "revision": model.revision,
                    "VAE": model.vae_source,
                    "scoring_model": scoring_model,
                    "preview_model": preview_model,
                    "digests": markdown_table(("component", "sha256"), sorted(model.digests.items())),
                }
            ),
        )

    return base_model
