"""The evaluation itself: eval loss, gallery and CLIP score of what was trained beside its base model's."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sdxl_pipeline.evaluation.clip_score import ClipScorer, summarize
from sdxl_pipeline.evaluation.comparison_grid import Pair, comparison_sheet
from sdxl_pipeline.evaluation.eval_models import EvalModel, load_eval_model
from sdxl_pipeline.evaluation.gallery import GalleryImage, draw, plan_caption_gallery, plan_gallery
from sdxl_pipeline.evaluation.paired_difference import paired_difference, released_losses
from sdxl_pipeline.evaluation.report import (
    change_since,
    describe_difference,
    figures,
    plot_losses,
    write_report,
)
from sdxl_pipeline.evaluation.scoring_model import scoring_model_folder, scoring_model_name
from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.models.components import load_noise_scheduler
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    ClipSummary,
    EvaluateSpec,
    EvaluationReport,
    FailedItem,
    LossSummary,
    ValidationImage,
)
from sdxl_pipeline.runtime.stage_runner import StopSignal, UserError
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps, read_images
from sdxl_pipeline.training.validation.eval_samples import EvalSource, choose_samples


@dataclass(frozen=True)
class Work:
    """What every part of the evaluation needs."""

    spec: EvaluateSpec
    eval_model: EvalModel
    reader: BatchReader
    samples: Samples
    reporter: Reporter
    stop: StopSignal


def evaluate(spec: EvaluateSpec, identity: str, reporter: Reporter, stop: StopSignal) -> EvaluationReport:
    """Measure what was trained against its base model, and write the report, which bears `identity`.

    Raises UserError when there is nothing to evaluate on, no scoring model, or weights that do not load back.
    """
    started = time.monotonic()
    settings = spec.settings
    # Before anything is computed, so that a missing scoring model costs nothing.
    clip_folder = (
        scoring_model_folder(settings, spec.base_model) if settings.evaluation_type == "clip" else None
    )
    source, samples = choose_samples(spec.datasets, settings)
    if not samples:
        raise UserError("there is no image to evaluate on: the datasets' aspect_buckets have no rows")
    reporter.log(f"Evaluating on {len(samples)} images ({source}).")
    eval_model = load_eval_model(spec)
    encoders = OnDemandEncoders(spec.base_model, spec.hardware)
    with closing(BatchReader(spec.datasets, encoders, eval_model.online_text_encoder)) as reader:
        work = Work(spec, eval_model, reader, samples, reporter, stop)
        return _measure(work, identity, source, clip_folder, started)


def _measure(
    work: Work, identity: str, source: EvalSource, clip_folder: Path | None, started: float
) -> EvaluationReport:
    """The report; its seconds count from `started`."""
    spec, settings, reporter, samples = work.spec, work.spec.settings, work.reporter, work.samples
    output_dir = Path(spec.output_dir)
    called = KIND_LABELS[spec.lora.weights_kind]
    base_loss = lora_loss = to_base = to_release = None
    loss_plot_path = output_dir / "loss_by_timestep.png"
    if not settings.eval_loss_disable:
        base_loss, lora_loss = measure_losses(work)
        plot_losses(base_loss, lora_loss, called, loss_plot_path)
        reporter.image("loss_by_timestep", loss_plot_path, f"Eval loss of the base model and the {called}")
        to_base = paired_difference(lora_loss, dict(base_loss.by_image))
        reporter.log(
            f"Eval loss: base model {base_loss.mean:.5f}, {called} {lora_loss.mean:.5f}, difference {describe_difference(to_base)}."
        )

    drawings = generate_gallery(work)
    images, gallery_path = save_gallery(work, drawings)
    base_clip = lora_clip = None
    if clip_folder is not None:
        base_clip, lora_clip = score_gallery(clip_folder, spec.hardware.device, drawings)
        reporter.log(f"CLIP score: base model {base_clip.mean:.2f}, {called} {lora_clip.mean:.2f}.")

    previous = Path(spec.previous_report_path) if spec.previous_report_path else None
    if previous is not None and lora_loss is not None:
        to_release = paired_difference(lora_loss, released_losses(previous))
    report = EvaluationReport(
        identity=identity,
        reused=False,
        weights_kind=spec.lora.weights_kind,
        lora_sha256=spec.lora.weights_sha256,
        eval_source=source,
        eval_images=len(samples),
        base_loss=base_loss,
        lora_loss=lora_loss,
        base_clip=base_clip,
        lora_clip=lora_clip,
        gallery_path=str(gallery_path),
        images=images,
        broken_images=tuple(
            FailedItem(name=after.shot.name, reason=after.fault)
            for _, after in drawings
            if after.fault is not None
        ),
        loss_plot_path=str(loss_plot_path) if lora_loss is not None else None,
        report_path=str(output_dir / "report.md"),
        difference_to_base=to_base,
        difference_to_release=to_release,
        change_since_release=change_since(previous, figures(base_loss, lora_loss, base_clip, lora_clip)),
        seconds=time.monotonic() - started,
    )
    write_report(report, f"run {Path(spec.lora.run_dir).name}", scoring_model_name(settings, spec.base_model))
    return report


def measure_losses(work: Work) -> tuple[LossSummary, LossSummary]:
    """Eval loss of the base model and of what was trained, on the same images, timesteps and noise."""
    spec, pipeline = work.spec, work.eval_model.pipeline
    scheduler = load_noise_scheduler(spec.base_model, spec.settings.scheduler_changes)
    objective = Objective(scheduler.alphas_cumprod.float(), scheduler.config.prediction_type)
    timesteps = eval_timesteps(spec.settings.eval_timesteps, scheduler.config.num_train_timesteps)

    def measure(name: str) -> LossSummary:
        def on_batch(done: int, total: int) -> None:
            work.reporter.progress(f"eval loss, {name}", done, total, "pairs")
            work.stop.raise_if_requested()

        # read for each model, since each may have text encoders of its own
        images = read_images(work.samples, work.reader, pipeline.vae.config.scaling_factor)
        return eval_loss(
            pipeline.unet, objective, images, timesteps, spec.settings.train_batch_size, on_batch
        )

    with work.eval_model.base():
        base = measure("base model")
    return base, measure(KIND_LABELS[spec.lora.weights_kind])


def generate_gallery(work: Work) -> list[tuple[GalleryImage, GalleryImage]]:
    """(base model's, trained model's) image of every shot: of the validation prompts, or of some captions where there are none."""
    spec, pipeline = work.spec, work.eval_model.pipeline
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)

    def images(already: int) -> list[GalleryImage]:
        if spec.prompts:
            shots = plan_gallery(spec.prompts, spec.settings, work.reader, zeros)
        else:
            shots = plan_caption_gallery(work.samples, spec.datasets, spec.settings, work.reader, zeros)
        drawings = []
        for done, shot in enumerate(shots, already):
            work.reporter.progress("gallery", done, 2 * len(shots), "images")
            drawings.append(draw(pipeline, shot, spec.settings, work.stop.raise_if_requested))
        return drawings

    with work.eval_model.base():
        before = images(0)
    after = images(len(before))
    work.reporter.progress("gallery", 2 * len(after), 2 * len(after), "images")
    return list(zip(before, after, strict=True))


def save_gallery(
    work: Work, drawings: list[tuple[GalleryImage, GalleryImage]]
) -> tuple[tuple[ValidationImage, ...], Path]:
    """Write every image, those of the base model as step 0, and the sheet that shows them side by side."""
    output_dir, steps = Path(work.spec.output_dir), work.spec.lora.steps
    called = KIND_LABELS[work.spec.lora.weights_kind]
    images = []
    for before, after in drawings:
        for drawing, folder, step in ((before, "base", 0), (after, "lora", steps)):
            shot = drawing.shot
            path = drawing.save(output_dir / "images" / folder)
            images.append(
                ValidationImage(step=step, name=shot.name, prompt=shot.prompt, path=str(path), seed=shot.seed)
            )
        if after.fault is not None:
            work.reporter.log(f"The {called}'s image {after.shot.name} is broken: {after.fault}.")
    pairs = [Pair(before.image, after.image, after.shot.prompt) for before, after in drawings]
    gallery_path = output_dir / "gallery.png"
    with atomic_path(gallery_path) as temporary:
        comparison_sheet(pairs, ("base model", f"{called}, {steps} steps")).save(temporary, format="PNG")
    work.reporter.image("gallery", gallery_path, f"Base model beside {called}", step=steps)
    return tuple(images), gallery_path


def score_gallery(
    clip_folder: Path, device: str, drawings: list[tuple[GalleryImage, GalleryImage]]
) -> tuple[ClipSummary, ClipSummary]:
    """CLIP score of the base model's and of the trained model's images."""
    scorer = ClipScorer(clip_folder, device)
    prompts = [before.shot.prompt for before, _ in drawings]
    base = summarize(scorer.scores([before.image for before, _ in drawings], prompts))
    return base, summarize(scorer.scores([after.image for _, after in drawings], prompts))
