"""The evaluation of a run against the base model: eval losses of its checkpoints, the selected one's scores and gallery, and the verdict."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from assets.asset_keys import asset_attributes, model_input, project_key, training_set_input, version
from assets.checks import result_checks
from assets.evaluation_metadata import history_table, report_metadata
from assets.event_log import user_errors_as_failures
from assets.lora import validation_prompts
from assets.run_lookup import datasets_of_run, read_training_spec, require_base_model, select_run
from assets.stage_asset import StageAsset
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.release import ReleaseSettings
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.evaluation_identity import EVALUATION_KEYS
from sdxl_pipeline.evaluation.history import read_history, record_evaluation
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import REPORT_FILE
from sdxl_pipeline.release.selected_weights import selected_lora
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport
from sdxl_pipeline.runtime.specs import TrainedLora, TrainingSet, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.checkpoint_files import run_checkpoints

CODE = "3"


class EvaluationConfig(dg.Config):
    """The run and the checkpoint that one run of this asset evaluates."""

    run: str = Field(
        default="",
        description="Identity (its first 8 characters or more) of the finished run to evaluate. Empty: the current LoRA.",
    )
    checkpoint: str = Field(
        default="",
        description='The checkpoint to select: best, last, or a step such as "step-500". Empty: released_checkpoint in config.json.',
    )


def release_dir(project: Project) -> Path:
    """Return the folder in which the project's release is built."""
    return Path(project.training.output_dir) / "release"


@dataclass(frozen=True)
class Evaluation(StageAsset[EvaluateSpec, EvaluationReport]):
    """The evaluation of a run with the settings of its training, and the evaluation settings that config.json has now.

    `current` is the value of `lora`, and `config` can select another finished run of the project.
    """

    stage = "evaluate"
    manifest_type = EvaluationReport
    project: Project
    work_dir: Path
    model: ResolvedModel
    training_set: TrainingSet
    current: TrainedLora
    config: EvaluationConfig

    @cached_property
    def lora(self) -> TrainedLora:
        """Return the run to evaluate."""
        return select_run(self.project, self.current, self.config.run)

    @cached_property
    def trained(self) -> TrainSpec:
        """Return the spec of its training."""
        return read_training_spec(self.lora)

    @property
    def is_current(self) -> bool:
        """Whether it is the run of the value of `lora`."""
        return self.lora.identity == self.current.identity

    @property
    def output_dir(self) -> Path:
        """Return the project's output folder."""
        return Path(self.project.training.output_dir)

    def build_spec(self) -> EvaluateSpec:
        """Return the spec, on the hardware of the training."""
        trained, training = self.trained, self.project.training
        datasets = self.training_set.datasets
        if not self.is_current:
            require_base_model(self.lora, trained, self.model)
            datasets = datasets_of_run(self.lora, trained, self.training_set)
        changes = {name: getattr(training, name) for name in EVALUATION_KEYS}
        if self.config.checkpoint:
            changes["released_checkpoint"] = _checkpoint_name(self.config.checkpoint)
        previous = release_dir(self.project) / REPORT_FILE
        return EvaluateSpec(
            base_model=self.model,
            hardware=trained.hardware,
            settings=trained.settings.model_copy(update=changes),
            lora=self.lora,
            datasets=datasets,
            prompts=validation_prompts(self.project),
            output_dir=str(self.output_dir / "evaluation"),
            checkpoints=run_checkpoints(self.lora),
            previous_report_path=str(previous) if previous.is_file() else None,
        )

    def complete(self, report: EvaluationReport) -> EvaluationReport:
        """Return the report with the run and the step, which reports of earlier versions lack."""
        if report.run_identity:
            return report
        return report.model_copy(update={"run_identity": self.lora.identity, "step": self.lora.steps})

    def summary(self, report: EvaluationReport) -> str:
        """Return which checkpoint was evaluated on how many images, or that its evaluation is reused."""
        what = f"step {report.step} of the run {report.run_identity[:16]}"
        if report.reused:
            return f"The same weights, images and settings were evaluated before: the report on {what} is reused."
        return f"Evaluated {what} on {report.eval_images} images ({report.eval_source}) in {report.seconds:.0f} s."

    def data_version(self, report: EvaluationReport) -> str:
        """Return the digest of weights, images and settings."""
        return report.identity

    def metadata(self, report: EvaluationReport) -> dict[str, Any]:
        """Return the run, the selection, losses, scores and plots, and the latest evaluations of the project."""
        history = history_table(read_history(self.output_dir))
        return report_metadata(report, self.is_current) | {"history": history}

    def check_results(self, report: EvaluationReport) -> list[dg.AssetCheckResult]:
        """Return the results of `evaluation_checks`."""
        settings = self.project.training
        released = selected_lora(self.lora, report.selected_weights, self.trained)
        check = result_checks.RELEASE_FORMATS_VALID.configured(settings.evaluation_checks)
        formats_valid = result_checks.check_formats(check, released, self.model, self.spec.settings)
        return [*result_checks.check_evaluation(report, settings), formats_valid]

    def record(self, report: EvaluationReport, results: Sequence[dg.AssetCheckResult]) -> None:
        """Add the evaluation to the project's history."""
        failed = [str(result.check_name) for result in results if not result.passed]
        record_evaluation(self.output_dir, report, failed)

    def tags(self, report: EvaluationReport) -> Mapping[str, str] | None:
        """Return the code version of an evaluation of another run or checkpoint, which the UI marks as stale.

        Dagster records that of the definition, which describes the current LoRA and the configured checkpoint; this tag replaces it.
        """
        if self.is_current and not self.config.checkpoint:
            return None
        return {"dagster/code_version": version(CODE, [report.identity, report.step])}


def _checkpoint_name(value: str) -> str:
    """Return the value of `released_checkpoint` that `value` stands for. Raises UserError if it names none."""
    try:
        return ReleaseSettings(released_checkpoint=value).released_checkpoint
    except ValidationError as error:
        raise UserError(
            f'checkpoint is {value!r}, which names no checkpoint. Write "best", "last" or a step, such as "step-500"'
        ) from error


def build_evaluation(project: Project) -> dg.AssetsDefinition:
    """Return `<project>/evaluation`."""
    key = project_key(project, "evaluation")
    settings_read = project.training.model_dump(
        mode="json", include=EVALUATION_KEYS | keys_used_by(TrainingSettings, "evaluation_checks")
    )
    prompts = [prompt.model_dump() for prompt in validation_prompts(project)]

    @dg.asset(
        key=key,
        **asset_attributes(project, "training", "torch", device=True),
        ins=model_input(project)
        | training_set_input(project)
        | {"lora": dg.AssetIn(key=project_key(project, "lora"), dagster_type=TrainedLora)},
        code_version=version(CODE, [settings_read, prompts]),
        check_specs=[check.spec(key) for check in result_checks.evaluation_checks(project.training)],
        description="Eval losses of base and checkpoints at fixed timesteps and noise; scores and a gallery of the selected checkpoint. `run` and "
        "`checkpoint` in the launchpad evaluate another finished run or checkpoint.",
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        config: EvaluationConfig,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        training_set: TrainingSet,
        lora: TrainedLora,
    ) -> Iterator[dg.MaterializeResult[EvaluationReport]]:
        work_dir = storage.work_dir(project.name, "evaluation")
        evaluated = Evaluation(project, work_dir, model, training_set, lora, config)
        with user_errors_as_failures():
            if not evaluated.is_current:
                context.log.info(
                    f"Evaluating the run {evaluated.lora.identity[:16]}, which is not the current LoRA."
                )
        yield evaluated.materialize(context, launcher)

    return evaluation
