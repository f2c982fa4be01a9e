"""The evaluation: eval losses of all checkpoints, selection of one, and its gallery and scores beside those of the base model."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sdxl_pipeline.evaluation.checkpoint_images import (
    BASE,
    CheckpointImages,
    column_of,
    describe_refusal,
)
from sdxl_pipeline.evaluation.checkpoint_losses import CheckpointSeries, measure_checkpoints
from sdxl_pipeline.evaluation.eval_models import load_eval_model
from sdxl_pipeline.evaluation.evaluation_context import EvaluationContext
from sdxl_pipeline.evaluation.evaluation_identity import ChangedWeightsError, candidates_of
from sdxl_pipeline.evaluation.gallery import (
    ColumnImage,
    GalleryColumn,
    Pair,
    comparison_grid,
    plan_columns,
    read_image,
)
from sdxl_pipeline.evaluation.html_report import write_pages
from sdxl_pipeline.evaluation.overfitting import detect_overfitting, loss_points
from sdxl_pipeline.evaluation.report import (
    change_since,
    describe_difference,
    metrics,
    paired_difference,
    plot_losses,
    plot_losses_by_step,
    released_losses,
    write_report,
)
from sdxl_pipeline.evaluation.scoring_model import require_scoring_models, scoring_model_name
from sdxl_pipeline.evaluation.selection import limit_candidates, require_step, select
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.runtime.evaluation_report import (
    CheckpointLoss,
    EvaluateSpec,
    EvaluationReport,
    Overfitting,
    Selection,
    Veto,
)
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.training.checkpoint.run_identity import settings_affecting_weights
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.logging.run_logs import EVAL_LOSS_FILE, EvalRow, read_eval_losses
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples, select_probe_samples

MAX_REFUSALS: Final = 5
"""Checkpoints whose images are checked before the last one is evaluated as it is; each costs a gallery and samples."""


@dataclass(frozen=True)
class Losses:
    """What the eval losses of a run show; empty with eval_loss_disable."""

    series: CheckpointSeries | None = None
    checkpoints: tuple[CheckpointLoss, ...] = ()
    overfitting: Overfitting | None = None


def evaluate(
    spec: EvaluateSpec, identity: str, folder: Path, reporter: Reporter, stop: StopSignal
) -> EvaluationReport:
    """Measure the checkpoints and their base model, and write the report, in which `identity` is recorded, to `folder`.

    Raises UserError when there is no image to evaluate on, no scoring model, no checkpoint of the requested step, or weights that do not
    load completely.
    """
    started = time.monotonic()
    settings = spec.settings
    # Resolved first, so that a missing scoring model fails before anything is computed.
    folders = require_scoring_models(settings, spec.base_model)
    every = candidates_of(spec)
    require_step(every, settings.released_checkpoint, spec.lora.released_weights)
    stopped = spec.lora.stopped_early
    candidates, left_out = limit_candidates(
        every, settings.released_checkpoint, best_step=stopped.best_step if stopped else None
    )
    if left_out:
        reporter.log(
            f"{len(left_out)} of {len({each.step for each in every})} steps are left out of the evaluation, to limit its time: "
            f"{', '.join(map(str, left_out))}."
        )
    source, samples = select_eval_samples(spec.datasets, settings, settings.micro_conditioning)
    if not samples:
        raise UserError("there is no image to evaluate on: the datasets' aspect_buckets have no rows")
    probe = select_probe_samples(spec.datasets, settings)
    if source == "training images":
        probe = probe.first_by_key(0)  # the eval loss is of the same images, so that a gap would mean nothing
    reporter.log(f"Evaluating {len(candidates)} models on {len(samples)} images ({source}).")
    eval_model = load_eval_model(spec)
    encoders = OnDemandEncoders(spec.base_model, spec.hardware)
    with closing(BatchReader(spec.datasets, encoders, eval_model.online_text_encoder)) as reader:
        context = EvaluationContext(spec, folder, eval_model, reader, source, samples, probe, reporter, stop)
        images = CheckpointImages(context, candidates, folders)
        return _evaluate(context, candidates, images, identity, started)


def _evaluate(
    context: EvaluationContext,
    candidates: Sequence[CheckpointWeights],
    images: CheckpointImages,
    identity: str,
    started: float,
) -> EvaluationReport:
    """Return the report; its `seconds` count from `started`."""
    spec, settings, reporter = context.spec, context.spec.settings, context.reporter
    rows = comparable_rows(spec)
    losses = Losses() if settings.eval_loss_disable else measure_losses(context, candidates, rows)
    selection = select_checkpoint(context, candidates, images, losses)
    selected = next(
        each for each in candidates if (each.step, each.weights) == (selection.step, selection.weights)
    )
    column = column_of(selected)
    gallery = [*images.gallery(BASE), *images.gallery(column)]
    for item in images.broken(column):
        reporter.log(f"The {context.label}'s image {item.name} is broken: {item.reason}.")
    scores, base_clip, lora_clip = images.scores(column) or (None, None, None)
    if lora_clip is not None and base_clip is not None:
        reporter.log(f"CLIP score: base model {base_clip.mean:.2f}, {context.label} {lora_clip.mean:.2f}.")

    base_loss = lora_loss = base_probe = to_release = None
    if losses.series is not None:
        base_loss, base_probe = losses.series.base.held_out, losses.series.base.probe
        lora_loss = losses.series.checkpoints[selected].held_out
    previous = Path(spec.previous_report_path) if spec.previous_report_path else None
    if previous is not None and lora_loss is not None:
        to_release = paired_difference(lora_loss, released_losses(previous))
    report = EvaluationReport(
        identity=identity,
        reused=False,
        run_identity=spec.lora.identity,
        step=selected.step,
        weights=selected.weights,
        weights_kind=spec.lora.weights_kind,
        lora_sha256=selected.sha256,
        eval_source=context.source,
        eval_images=len(context.samples),
        base_loss=base_loss,
        lora_loss=lora_loss,
        base_probe=base_probe,
        checkpoints=losses.checkpoints,
        selected=selection,
        selected_weights=selected,
        overfitting=losses.overfitting,
        scores=scores,
        memorisation=images.memorisation(column),
        base_clip=base_clip,
        lora_clip=lora_clip,
        gallery_path=str(save_grid(context, images, column)),
        images=tuple(each.image for each in gallery),
        broken_images=images.broken(column),
        loss_plot_path=None,
        report_path=str(context.folder / "report.md"),
        difference_to_base=paired_difference(lora_loss, dict(base_loss.by_image))
        if lora_loss is not None and base_loss is not None
        else None,
        difference_to_release=to_release,
        change_since_release=change_since(previous, metrics(base_loss, lora_loss, base_clip, lora_clip)),
        seconds=0.0,
    )
    report = report.model_copy(update=save_plots(context, report, rows))
    report = report.model_copy(
        update=save_pages(context, report, generate_others(context, candidates, images, column), rows)
    )
    report = report.model_copy(update={"seconds": time.monotonic() - started})
    write_report(report, _title(context), scoring_model_name(settings, spec.base_model))
    return report


def comparable_rows(spec: EvaluateSpec) -> list[EvalRow]:
    """Return the eval losses measured during the training that can be compared with those measured here.

    They are of the released kind of weights, which can change after the training. There are none if the training quantized the base model:
    the evaluation does not, and the difference would be taken for a change from one step to the next.
    """
    if spec.hardware.base_model_precision != "no_change":
        return []
    rows = read_eval_losses(Path(spec.lora.run_dir) / EVAL_LOSS_FILE)
    return [row for row in rows if row.weights == spec.lora.released_weights]


def measure_losses(
    context: EvaluationContext, candidates: Sequence[CheckpointWeights], rows: Sequence[EvalRow]
) -> Losses:
    """Return the losses of all candidates, and whether they show over-fitting; `rows` are those measured during the training."""
    series = measure_checkpoints(context, candidates)
    released = context.spec.lora.released_weights
    checkpoints = series.compared(released, held_out=len(context.held_out) > 0)
    of_kind = [loss for loss in checkpoints if loss.weights == released]
    overfitting = detect_overfitting(
        loss_points(of_kind, rows, series.base.held_out, series.base.probe),
        of_kind[-1].gap,
        context.source,
        len(context.samples),
    )
    context.reporter.log(overfitting.text)
    return Losses(series, checkpoints, overfitting)


def select_checkpoint(
    context: EvaluationContext,
    candidates: Sequence[CheckpointWeights],
    images: CheckpointImages,
    losses: Losses,
) -> Selection:
    """Return the selected checkpoint: that of the rule, again without it as long as its images are refused.

    A requested checkpoint is selected even if its images are refused. After MAX_REFUSALS refusals no further checkpoint is tried. Raises
    UserError if a requested checkpoint has no eval loss, because its file has changed or the loss is not finite.
    """
    spec = context.spec
    requested, kind = spec.settings.released_checkpoint, spec.lora.released_weights
    selectable = {each.step: each for each in candidates if each.weights == kind}
    vetoes: list[Veto] = []
    if losses.series is not None:
        vetoes = list(losses.series.vetoes)
        asked = f"step-{max(selectable)}" if requested == "last" else requested
        for veto in vetoes:
            if f"step-{veto.step}" == asked:
                raise UserError(
                    f'released_checkpoint: "{requested}" cannot be evaluated: {veto.reason}. Write "best" or another step'
                )
            del selectable[veto.step]
    compares_subjects = spec.settings.pretrained_similarity_model_name_or_path is not None
    refused: list[int] = []
    while True:
        steps = refused if len(refused) == MAX_REFUSALS else list(selectable)
        selection = select(losses.checkpoints, steps, requested, kind, vetoes)
        if compares_subjects and not selection.vetoed and len(selection.within_one_error) > 1:
            found = {
                step: images.similarities(column_of(selectable[step])) for step in selection.within_one_error
            }
            similarities = {step: values for step, values in found.items() if values is not None}
            selection = select(losses.checkpoints, steps, requested, kind, vetoes, similarities)
        if selection.vetoed:
            break
        weights = selectable[selection.step]
        try:
            reason = images.refusal(column_of(weights))
        except ChangedWeightsError as error:
            if weights.is_final or weights.name == requested:
                raise
            reason = str(error)
        if reason is None:
            break
        context.reporter.log(describe_refusal(weights, reason))
        vetoes.append(Veto(step=weights.step, reason=reason))
        refused.append(weights.step)
    context.reporter.log(selection.text)
    return selection


def generate_others(
    context: EvaluationContext,
    candidates: Sequence[CheckpointWeights],
    images: CheckpointImages,
    selected: GalleryColumn,
) -> list[ColumnImage]:
    """Return the gallery of other checkpoints and of other scales of the selected one; those whose files have changed are left out."""
    settings = context.spec.settings
    scales = settings.gallery_scales if context.spec.lora.weights_kind == "lora" else ()
    steps = [each.step for each in candidates if each.weights == selected.weights]
    others = []
    for column in plan_columns(steps, selected, settings.gallery_checkpoints, scales):
        if column in (BASE, selected):
            continue
        try:
            others += images.gallery(column)
        except ChangedWeightsError as error:
            context.reporter.log(f"The gallery leaves out {column.title}: {error}.")
    return others


def save_grid(context: EvaluationContext, images: CheckpointImages, column: GalleryColumn) -> Path:
    """Write the grid that compares a checkpoint with the base model, and return its path."""
    pairs = [
        Pair(read_image(before.image.path), read_image(after.image.path), after.image.prompt)
        for before, after in zip(images.gallery(BASE), images.gallery(column), strict=True)
    ]
    path = context.folder / "gallery.png"
    with atomic_path(path) as temporary:
        comparison_grid(pairs, ("base model", f"{context.label}, {column.step} steps")).save(
            temporary, format="PNG"
        )
    context.reporter.image("gallery", path, f"Base model beside {context.label}", step=column.step)
    return path


def save_plots(
    context: EvaluationContext, report: EvaluationReport, rows: Sequence[EvalRow]
) -> dict[str, str]:
    """Write the plots of the losses by timestep and by step, and return their paths as fields of the report; none without losses."""
    if report.base_loss is None or report.lora_loss is None:
        return {}
    by_timestep, by_step = context.folder / "loss_by_timestep.png", context.folder / "loss_by_step.png"
    plot_losses(report.base_loss, report.lora_loss, context.label, by_timestep)
    plot_losses_by_step(report, rows, by_step)
    context.reporter.image(
        "loss_by_timestep", by_timestep, f"Eval loss of the base model and the {context.label}"
    )
    context.reporter.image("loss_by_step", by_step, "Eval loss by step")
    if report.difference_to_base is not None:
        context.reporter.log(
            f"Eval loss: base model {report.base_loss.mean:.5f}, {context.label} {report.lora_loss.mean:.5f}, difference "
            f"{describe_difference(report.difference_to_base)}."
        )
    return {"loss_plot_path": str(by_timestep), "loss_by_step_path": str(by_step)}


def save_pages(
    context: EvaluationContext,
    report: EvaluationReport,
    others: Sequence[ColumnImage],
    rows: Sequence[EvalRow],
) -> dict[str, str | None]:
    """Write the HTML pages, and return their paths as fields of the report."""
    lora = context.spec.lora
    names = dict.fromkeys([*lora.trained_images, *lora.held_out_images])
    pages = write_pages(
        report,
        context.folder,
        title=_title(context),
        gallery=[each.image for each in others],
        training_losses=rows,
        settings=settings_affecting_weights(context.spec.settings),
        data_dirs={dataset.dataset_id: dataset.data_dir for dataset in context.spec.datasets},
        images_by_dataset={
            name: (lora.trained_images.get(name, 0), lora.held_out_images.get(name, 0)) for name in names
        },
    )
    return {"html_path": str(pages.report), "blind_ab_path": str(pages.blind_ab) if pages.blind_ab else None}


def _title(context: EvaluationContext) -> str:
    return f"run {Path(context.spec.lora.run_dir).name}"
