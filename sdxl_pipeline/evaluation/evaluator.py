"""The evaluation: eval loss, gallery and CLIP score of the trained model and of its base model."""

import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from sdxl_pipeline.evaluation.clip_score import ClipScorer, summarize
from sdxl_pipeline.evaluation.eval_models import EvalModel, load_eval_model
from sdxl_pipeline.evaluation.gallery import (
    GalleryImage,
    Pair,
    comparison_grid,
    generate,
    plan_caption_gallery,
    plan_gallery,
)
from sdxl_pipeline.evaluation.report import (
    change_since,
    describe_difference,
    metrics,
    paired_difference,
    plot_losses,
    released_losses,
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
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps, load_eval_images
from sdxl_pipeline.training.validation.eval_samples import EvalSource, select_eval_samples


@dataclass(frozen=True)
class EvaluationContext:
    """What every part of the evaluation needs."""

    spec: EvaluateSpec
    eval_model: EvalModel
    reader: BatchReader
    samples: Samples
    reporter: Reporter
    stop: StopSignal

    @property
    def label(self) -> str:
        """The trained model's name in texts."""
        return KIND_LABELS[self.spec.lora.weights_kind]


def evaluate(spec: EvaluateSpec, identity: str, reporter: Reporter, stop: StopSignal) -> EvaluationReport:
    """Measure the trained model and its base model, and write the report, in which `identity` is recorded.

    Raises UserError when there is no image to evaluate on, no scoring model, or weights that do not load completely.
    """
    started = time.monotonic()
    settings = spec.settings
    # Resolved first, so that a missing scoring model fails before anything is computed.
    clip_folder = (
        scoring_model_folder(settings, spec.base_model) if settings.evaluation_type == "clip" else None
    )
    source, samples = select_eval_samples(spec.datasets, settings, settings.micro_conditioning)
    if not samples:
        raise UserError("there is no image to evaluate on: the datasets' aspect_buckets have no rows")
    reporter.log(f"Evaluating on {len(samples)} images ({source}).")
    eval_model = load_eval_model(spec)
    encoders = OnDemandEncoders(spec.base_model, spec.hardware)
    with closing(BatchReader(spec.datasets, encoders, eval_model.online_text_encoder)) as reader:
        context = EvaluationContext(spec, eval_model, reader, samples, reporter, stop)
        return _measure(context, identity, source, clip_folder, started)


def _measure(
    context: EvaluationContext, identity: str, source: EvalSource, clip_folder: Path | None, started: float
) -> EvaluationReport:
    """Return the report; its `seconds` count from `started`."""
    spec, settings, reporter, label = context.spec, context.spec.settings, context.reporter, context.label
    output_dir = Path(spec.output_dir)
    base_loss = lora_loss = to_base = to_release = None
    loss_plot_path = output_dir / "loss_by_timestep.png"
    if not settings.eval_loss_disable:
        base_loss, lora_loss = measure_losses(context)
        plot_losses(base_loss, lora_loss, label, loss_plot_path)
        reporter.image("loss_by_timestep", loss_plot_path, f"Eval loss of the base model and the {label}")
        to_base = paired_difference(lora_loss, dict(base_loss.by_image))
        reporter.log(
            f"Eval loss: base model {base_loss.mean:.5f}, {label} {lora_loss.mean:.5f}, difference {describe_difference(to_base)}."
        )

    gallery = generate_gallery(context)
    images, gallery_path = save_gallery(context, gallery)
    base_clip = lora_clip = None
    if clip_folder is not None:
        base_clip, lora_clip = score_gallery(clip_folder, spec.hardware.device, gallery)
        reporter.log(f"CLIP score: base model {base_clip.mean:.2f}, {label} {lora_clip.mean:.2f}.")

    previous = Path(spec.previous_report_path) if spec.previous_report_path else None
    if previous is not None and lora_loss is not None:
        to_release = paired_difference(lora_loss, released_losses(previous))
    report = EvaluationReport(
        identity=identity,
        reused=False,
        weights_kind=spec.lora.weights_kind,
        lora_sha256=spec.lora.weights_sha256,
        eval_source=source,
        eval_images=len(context.samples),
        base_loss=base_loss,
        lora_loss=lora_loss,
        base_clip=base_clip,
        lora_clip=lora_clip,
        gallery_path=str(gallery_path),
        images=images,
        broken_images=tuple(
            FailedItem(name=after.prompt.name, reason=after.defect)
            for _, after in gallery
            if after.defect is not None
        ),
        loss_plot_path=str(loss_plot_path) if lora_loss is not None else None,
        report_path=str(output_dir / "report.md"),
        difference_to_base=to_base,
        difference_to_release=to_release,
        change_since_release=change_since(previous, metrics(base_loss, lora_loss, base_clip, lora_clip)),
        seconds=time.monotonic() - started,
    )
    write_report(report, f"run {Path(spec.lora.run_dir).name}", scoring_model_name(settings, spec.base_model))
    return report


def measure_losses(context: EvaluationContext) -> tuple[LossSummary, LossSummary]:
    """Return the eval loss of the base model and of the trained model, on the same images, timesteps and noise."""
    spec, pipeline = context.spec, context.eval_model.pipeline
    scheduler = load_noise_scheduler(spec.base_model, spec.settings.scheduler_changes)
    objective = Objective.plain(scheduler)
    timesteps = eval_timesteps(spec.settings.eval_timesteps, scheduler.config.num_train_timesteps)

    def measure(name: str) -> LossSummary:
        def on_batch(done: int, total: int) -> None:
            context.reporter.progress(f"eval loss, {name}", done, total, "pairs")
            context.stop.raise_if_requested()

        # read once per model, since each model may have its own text encoders
        images = load_eval_images(context.samples, context.reader, pipeline.vae.config.scaling_factor)
        return eval_loss(
            pipeline.unet, objective, images, timesteps, spec.settings.train_batch_size, on_batch
        )

    with context.eval_model.base():
        base = measure("base model")
    return base, measure(context.label)


def generate_gallery(context: EvaluationContext) -> list[tuple[GalleryImage, GalleryImage]]:
    """Return (base model's, trained model's) image of every gallery prompt: the validation prompts, or captions if there are none."""
    spec, pipeline = context.spec, context.eval_model.pipeline
    zeros = bool(pipeline.config.force_zeros_for_empty_prompt)

    def generate_all(finished: int) -> list[GalleryImage]:
        if spec.prompts:
            prompts = plan_gallery(spec.prompts, spec.settings, context.reader, zeros)
        else:
            prompts = plan_caption_gallery(
                context.samples, spec.datasets, spec.settings, context.reader, zeros
            )
        images = []
        for done, prompt in enumerate(prompts, finished):
            context.reporter.progress("gallery", done, 2 * len(prompts), "images")
            images.append(generate(pipeline, prompt, spec.settings, context.stop.raise_if_requested))
        return images

    with context.eval_model.base():
        before = generate_all(0)
    after = generate_all(len(before))
    context.reporter.progress("gallery", 2 * len(after), 2 * len(after), "images")
    return list(zip(before, after, strict=True))


def save_gallery(
    context: EvaluationContext, gallery: list[tuple[GalleryImage, GalleryImage]]
) -> tuple[tuple[ValidationImage, ...], Path]:
    """Write every image, those of the base model as step 0, and the grid that compares them; return both."""
    output_dir, steps, label = Path(context.spec.output_dir), context.spec.lora.steps, context.label
    images = []
    for before, after in gallery:
        for generated, folder, step in ((before, "base", 0), (after, "lora", steps)):
            prompt = generated.prompt
            path = generated.save(output_dir / "images" / folder)
            images.append(
                ValidationImage(
                    step=step, name=prompt.name, prompt=prompt.text, path=str(path), seed=prompt.seed
                )
            )
        if after.defect is not None:
            context.reporter.log(f"The {label}'s image {after.prompt.name} is broken: {after.defect}.")
    pairs = [Pair(before.image, after.image, after.prompt.text) for before, after in gallery]
    gallery_path = output_dir / "gallery.png"
    with atomic_path(gallery_path) as temporary:
        comparison_grid(pairs, ("base model", f"{label}, {steps} steps")).save(temporary, format="PNG")
    context.reporter.image("gallery", gallery_path, f"Base model beside {label}", step=steps)
    return tuple(images), gallery_path


def score_gallery(
    clip_folder: Path, device: str, gallery: list[tuple[GalleryImage, GalleryImage]]
) -> tuple[ClipSummary, ClipSummary]:
    """Return the CLIP score of the base model's and of the trained model's images."""
    scorer = ClipScorer(clip_folder, device)
    prompts = [before.prompt.text for before, _ in gallery]
    base = summarize(scorer.scores([before.image for before, _ in gallery], prompts))
    return base, summarize(scorer.scores([after.image for _, after in gallery], prompts))
