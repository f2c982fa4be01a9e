"""The base model: path, revision and digests of its files."""

from collections.abc import Iterator

import dagster as dg

from assets.asset_keys import asset_attributes, project_key, version
from assets.event_log import user_errors_as_failures
from assets.metadata import base_model_metadata
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.evaluation.scoring_model import scoring_model_folder
from sdxl_pipeline.models.base_model import ResolvedModel, resolve_base_model
from sdxl_pipeline.models.tiny_autoencoder import tiny_autoencoder_folder

CODE = "1"


def build_base_model(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/base_model`; its data version is the digest of its files, so a repeated download keeps it."""
    settings = project.training

    @dg.asset(
        key=project_key(project, "base_model"),
        **asset_attributes(project, "training", "huggingface"),
        code_version=version(
            CODE,
            [
                settings.pretrained_model_name_or_path,
                settings.pretrained_vae_model_name_or_path,
                settings.model_flavour,
                settings.revision,
            ],
        ),
        description="The SDXL model to fine-tune: downloaded if it is a Hub id; its data version is the digest of its components.",
    )
    def base_model(
        context: dg.AssetExecutionContext, storage: Storage
    ) -> Iterator[dg.MaterializeResult[ResolvedModel]]:
        with user_errors_as_failures():
            model = resolve_base_model(settings, project.folder, cache_dir=storage.work_dir("base_models"))
            # Resolved now, so that a missing model fails before the training and not after it.
            scores = settings.evaluation_type == "clip"
            scoring_model = str(scoring_model_folder(settings, model)) if scores else None
            previews = settings.validation_preview
            preview_model = str(tiny_autoencoder_folder(settings, model)) if previews else None
        context.log.info(f"{model.source}: {model.path}, revision {model.revision or 'local files'}")
        yield dg.MaterializeResult(
            value=model,
            data_version=dg.DataVersion(model.digest),
            metadata=base_model_metadata(model, scoring_model, preview_model),
        )

    return base_model
