"""The evaluation of the LoRA against the base model: eval loss, CLIP score and a gallery."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from assets.asset_keys import asset_attributes, model_input, project_key, training_set_input, version
from assets.checks import result_checks
from assets.lora import read_training_spec, validation_prompts
from assets.metadata import drop_none, inline_image, markdown_table
from assets.stage_asset import StageAsset
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.evaluation.evaluation_identity import EVALUATION_KEYS
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import REPORT_FILE
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    ClipSummary,
    EvaluateSpec,
    EvaluationReport,
    TrainedLora,
    TrainingSet,
)

CODE = "2"


def release_dir(project: Project) -> Path:
    """Return the folder in which the project's release is built."""
    return Path(project.training.output_dir) / "release"


@dataclass(frozen=True)
class Evaluation(StageAsset[EvaluateSpec, EvaluationReport]):
    """The evaluation of a LoRA with the settings of its training, and the evaluation settings that config.json has now."""

    stage = "evaluate"
    manifest_type = EvaluationReport
    project: Project
    work_dir: Path
    model: ResolvedModel
    training_set: TrainingSet
    lora: TrainedLora

    def build_spec(self) -> EvaluateSpec:
        """Return the spec, on the hardware of the training."""
        trained, training = read_training_spec(self.lora), self.project.training
        previous = release_dir(self.project) / REPORT_FILE
        return EvaluateSpec(
            base_model=self.model,
            hardware=trained.hardware,
            settings=trained.settings.model_copy(
                update={name: getattr(training, name) for name in EVALUATION_KEYS}
            ),
            lora=self.lora,
            datasets=self.training_set.datasets,
            prompts=validation_prompts(self.project),
            output_dir=str(Path(training.output_dir) / "evaluation"),
            previous_report_path=str(previous) if previous.is_file() else None,
        )

    def summary(self, report: EvaluationReport) -> str:
        """Return on how many images the evaluation was measured, or that it is reused."""
        if report.reused:
            return "The same weights, images and settings were evaluated before: the report is reused."
        return f"Evaluated on {report.eval_images} images ({report.eval_source}) in {report.seconds:.0f} s."

    def data_version(self, report: EvaluationReport) -> str:
        """Return the digest of weights, images and settings."""
        return report.identity

    def metadata(self, report: EvaluationReport) -> dict[str, Any]:
        """Return losses, CLIP scores and plots."""
        base, lora = report.base_loss, report.lora_loss
        scores: list[tuple[str, ClipSummary | None]] = [
            ("base", report.base_clip),
            (KIND_LABELS[report.weights_kind], report.lora_clip),
        ]
        rows = [(name, clip.min, clip.mean, clip.max, clip.std) for name, clip in scores if clip]
        header = ("CLIP score", "minimum", "mean", "maximum", "standard deviation")
        changes = sorted(report.change_since_release.items())
        return drop_none(
            {
                "gallery": inline_image(
                    report.gallery_path, f"base beside {KIND_LABELS[report.weights_kind]}"
                ),
                "eval_loss_base": base.mean if base else None,
                "eval_loss_lora": lora.mean if lora else None,
                "eval_loss_ratio": lora.mean / base.mean if base and lora else None,
                "difference_to_base": describe_difference(report.difference_to_base)
                if report.difference_to_base
                else None,
                "difference_to_release": describe_difference(report.difference_to_release)
                if report.difference_to_release
                else None,
                "eval_images": f"{report.eval_images} ({report.eval_source})",
                "clip_score_base": report.base_clip.mean if report.base_clip else None,
                "clip_score_lora": report.lora_clip.mean if report.lora_clip else None,
                "clip_scores": markdown_table(header, rows) if rows else None,
                "eval_loss_by_timestep": inline_image(report.loss_plot_path, "eval loss by timestep")
                if report.loss_plot_path
                else None,
                "change_since_release": markdown_table(("metric", "change"), changes) if changes else None,
                "report": dg.MetadataValue.path(report.report_path),
                "seconds": report.seconds,
                "reused": report.reused,
            }
        )

    def check_results(self, report: EvaluationReport) -> list[dg.AssetCheckResult]:
        """Return the results of `EVALUATION_CHECKS`."""
        formats_valid = result_checks.check_formats(
            result_checks.RELEASE_FORMATS_VALID, self.lora, self.model, self.spec.settings
        )
        return [*result_checks.check_evaluation(report), formats_valid]


def build_evaluation(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/evaluation`."""
    key = project_key(project, "evaluation")
    settings_read = project.training.model_dump(mode="json", include=EVALUATION_KEYS)
    prompts = [prompt.model_dump() for prompt in validation_prompts(project)]

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "torch", device=True),
        ins=model_input(project)
        | training_set_input(project)
        | {"lora": dg.AssetIn(key=project_key(project, "lora"), dagster_type=TrainedLora)},
        code_version=version(CODE, [settings_read, prompts]),
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
        work_dir = storage.work_dir(project.name, "evaluation")
        yield Evaluation(project, work_dir, model, training_set, lora).materialize(context, launcher)

    return evaluation
