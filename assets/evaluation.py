"""What the LoRA is worth: eval loss against the base model, CLIP score, base beside LoRA."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg

from assets.asset_keys import GPU_POOL, project_key, version
from assets.checks import result_checks
from assets.dataset_inputs import build_training_datasets, cache_inputs, model_input, validation_prompts
from assets.lora import read_training_spec
from assets.metadata import drop_none, inline_image, markdown_table
from resources.stage_client import LocalStageClient
from resources.storage import Storage
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.evaluation.evaluation_identity import LOOKED_AT
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.export import REPORT_FILE
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    ClipSummary,
    EvaluateSpec,
    EvaluationReport,
    TrainedLora,
)

CODE = "2"


def release_dir(project: Project) -> Path:
    """Where the project's release is put together."""
    return Path(project.training.output_dir) / "release"


def build_evaluation(project: Project) -> dg.AssetsDefinition:
    """`<project>/evaluation`."""
    key = project_key(project, "evaluation")
    prompts = validation_prompts(project)
    settings_read = project.training.model_dump(mode="json", include=LOOKED_AT)

    @dg.asset(
        key=key,
        group_name=project.name,
        kinds={"torch"},
        pool=GPU_POOL,
        ins=model_input(project)
        | cache_inputs(project)
        | {"lora": dg.AssetIn(key=project_key(project, "lora"), dagster_type=TrainedLora)},
        code_version=version(CODE, [settings_read, [prompt.model_dump() for prompt in prompts]]),
        check_specs=result_checks.evaluation_specs(key),
        description="Eval loss of base and LoRA at fixed timesteps and noise, CLIP score, and a gallery of base beside LoRA.",
    )
    def evaluation(
        context: dg.AssetExecutionContext,
        launcher: LocalStageClient,
        storage: Storage,
        model: ResolvedModel,
        lora: TrainedLora,
        **datasets: Any,
    ) -> Iterator[Any]:
        trained = read_training_spec(lora)
        # What the run was trained with stands; how it is looked at follows config.json as it is now.
        looked_at = {name: getattr(project.training, name) for name in LOOKED_AT}
        previous = release_dir(project) / REPORT_FILE
        spec = EvaluateSpec(
            base_model=model,
            hardware=trained.hardware,
            settings=trained.settings.model_copy(update=looked_at),
            lora=lora,
            datasets=build_training_datasets(project, storage, datasets),
            prompts=prompts,
            output_dir=str(Path(project.training.output_dir) / "evaluation"),
            previous_report_path=str(previous) if previous.is_file() else None,
        )
        report = launcher.run(
            context,
            "evaluate",
            spec,
            EvaluationReport,
            storage.work_dir(project.name, "evaluation"),
            spec.hardware,
        )
        if report.reused:
            context.log.info(
                "The same weights, images and settings were evaluated before: the report is reused."
            )
        yield dg.MaterializeResult(
            value=report,
            data_version=dg.DataVersion(report.identity),
            metadata=_metadata(report),
            check_results=[
                *result_checks.check_evaluation(report),
                result_checks.check_formats("loads_everywhere", lora, model, trained.settings),
            ],
        )

    return evaluation


def _metadata(report: EvaluationReport) -> dict[str, Any]:
    base, lora = report.base_loss, report.lora_loss
    scores: list[tuple[str, ClipSummary | None]] = [
        ("base", report.base_clip),
        (KIND_LABELS[report.weights_kind], report.lora_clip),
    ]
    rows = [(name, clip.min, clip.mean, clip.max, clip.std) for name, clip in scores if clip]
    header = ("CLIP score", "minimum", "mean", "maximum", "standard deviation")
    return drop_none(
        {
            "gallery": inline_image(report.gallery_path, f"base beside {KIND_LABELS[report.weights_kind]}"),
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
            "change_since_release": markdown_table(
                ("figure", "change"), sorted(report.change_since_release.items())
            )
            if report.change_since_release
            else None,
            "report": dg.MetadataValue.path(report.report_path),
            "seconds": report.seconds,
            "reused": report.reused,
        }
    )
