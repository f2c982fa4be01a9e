"""The evaluation of the LoRA against the base model: eval loss, CLIP score and a gallery."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg

from assets.asset_keys import asset_attributes, project_key, version
from assets.checks import result_checks
from assets.dataset_inputs import model_input, validation_prompts
from assets.lora import read_training_spec
from assets.metadata import evaluation_metadata
from assets.stage_asset import materialize_stage
from assets.training_set import training_set_input
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.evaluation.evaluation_identity import EVALUATION_KEYS
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import REPORT_FILE
from sdxl_pipeline.runtime.specs import EvaluateSpec, EvaluationReport, TrainedLora, TrainingSet

CODE = "2"


def release_dir(project: Project) -> Path:
    """Return the folder in which the project's release is built."""
    return Path(project.training.output_dir) / "release"


def build_evaluation(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/evaluation`."""
    key = project_key(project, "evaluation")
    prompts = validation_prompts(project)
    settings_read = project.training.model_dump(mode="json", include=EVALUATION_KEYS)

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "torch", device=True),
        ins=model_input(project)
        | training_set_input(project)
        | {"lora": dg.AssetIn(key=project_key(project, "lora"), dagster_type=TrainedLora)},
        code_version=version(CODE, [settings_read, [prompt.model_dump() for prompt in prompts]]),
        check_specs=[check.spec(key) for check in result_checks.EVALUATION_CHECKS],
        description="Eval loss of base and LoRA at fixed timesteps and noise, CLIP score, and a gallery of base beside LoRA.",
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        training_set: TrainingSet,
        lora: TrainedLora,
    ) -> Iterator[dg.MaterializeResult[EvaluationReport]]:
        trained = read_training_spec(lora)
        # Training settings are those of the run; evaluation settings are those of config.json now.
        evaluation_settings = {name: getattr(project.training, name) for name in EVALUATION_KEYS}
        previous = release_dir(project) / REPORT_FILE
        spec = EvaluateSpec(
            base_model=model,
            hardware=trained.hardware,
            settings=trained.settings.model_copy(update=evaluation_settings),
            lora=lora,
            datasets=training_set.datasets,
            prompts=prompts,
            output_dir=str(Path(project.training.output_dir) / "evaluation"),
            previous_report_path=str(previous) if previous.is_file() else None,
        )
        yield materialize_stage(
            context,
            launcher,
            "evaluate",
            spec,
            EvaluationReport,
            storage.work_dir(project.name, "evaluation"),
            summary=_summary,
            data_version=lambda report: report.identity,
            metadata=evaluation_metadata,
            checks=lambda report: [
                *result_checks.check_evaluation(report),
                result_checks.check_formats(
                    result_checks.RELEASE_FORMATS_VALID, lora, model, trained.settings
                ),
            ],
        )

    return evaluation


def _summary(report: EvaluationReport) -> str:
    if report.reused:
        return "The same weights, images and settings were evaluated before: the report is reused."
    return f"Evaluated on {report.eval_images} images ({report.eval_source}) in {report.seconds:.0f} s."
