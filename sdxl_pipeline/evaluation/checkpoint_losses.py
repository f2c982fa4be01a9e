"""Eval losses of the base model and of every kept checkpoint, trained and EMA weights, on held-out images and on the train probe.

A loss is a pure function of the weights and of the inputs in its cache key, so it is measured once: another evaluation of the same run,
for example with another released_checkpoint, reads exactly the same numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

from pydantic import ValidationError

from sdxl_pipeline.evaluation.evaluation_context import EvaluationContext
from sdxl_pipeline.evaluation.evaluation_identity import ChangedWeightsError
from sdxl_pipeline.evaluation.overfitting import probe_gap
from sdxl_pipeline.evaluation.report import describe_checkpoint, paired_difference
from sdxl_pipeline.evaluation.selection import lowest_loss
from sdxl_pipeline.files.atomic_files import write_text_atomic
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.components import load_noise_scheduler
from sdxl_pipeline.runtime.evaluation_report import CheckpointLoss, EvaluateSpec, LossSummary, Veto
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import Samples
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.text_encoder_training import text_windows
from sdxl_pipeline.training.validation.eval_loss import eval_loss, eval_timesteps, load_eval_images

LOSSES_FOLDER = "losses"
"""Subfolder of the project's evaluations with the losses measured so far."""

LOSS_VERSION = 1
"""To be increased with every change that changes a loss."""


@dataclass(frozen=True)
class ModelLosses:
    """Eval losses of one model."""

    held_out: LossSummary
    probe: LossSummary | None

    @property
    def is_finite(self) -> bool:
        """Whether the model computes with finite numbers."""
        return all(isfinite(loss.mean) for loss in (self.held_out, self.probe) if loss is not None)


@dataclass(frozen=True)
class CheckpointSeries:
    """Eval losses of the base model and of the checkpoints that could be measured, by step."""

    base: ModelLosses
    checkpoints: Mapping[CheckpointWeights, ModelLosses]
    vetoes: tuple[Veto, ...]
    """The others of the weights that can be selected."""

    def compared(self, weights: str, *, held_out: bool) -> tuple[CheckpointLoss, ...]:
        """Return all losses with their differences to the base model and, if there are `held_out` images, to the best of `weights`."""
        selectable = {
            each.step: losses for each, losses in self.checkpoints.items() if each.weights == weights
        }
        best = None
        if held_out and selectable:
            best = selectable[lowest_loss({step: losses.held_out for step, losses in selectable.items()})]
        return tuple(
            CheckpointLoss(
                step=each.step,
                weights=each.weights,
                sha256=each.sha256,
                held_out=losses.held_out,
                probe=losses.probe,
                to_base=paired_difference(losses.held_out, dict(self.base.held_out.by_image)),
                to_best=paired_difference(losses.held_out, dict(best.held_out.by_image)) if best else None,
                gap=probe_gap(self.base.held_out, self.base.probe, losses.held_out, losses.probe),
            )
            for each, losses in self.checkpoints.items()
        )


class LossCache:
    """Losses as files named by the digest of everything that they depend on. A file that cannot be read is measured again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: Mapping[str, object], measure: Callable[[], LossSummary]) -> LossSummary:
        """Return the stored loss, or measure and store it; a loss that is not finite is not stored."""
        path = self._folder / f"{digest_json(dict(key))[:32]}.json"
        try:
            return LossSummary.model_validate_json(path.read_bytes())
        except (FileNotFoundError, ValidationError):
            loss = measure()
        if isfinite(loss.mean):
            write_text_atomic(path, loss.model_dump_json() + "\n")
        return loss


def measure_checkpoints(
    context: EvaluationContext, candidates: Sequence[CheckpointWeights]
) -> CheckpointSeries:
    """Return the losses of the base model and of `candidates`, in their order.

    A checkpoint whose file has changed, or whose loss is not finite, is logged and left out. Raises UserError if none is left.
    """
    meter = _Meter(context)
    base = meter.measure(None)
    context.reporter.log(f"Eval loss of the base model: {_describe(base)}.")
    measured: dict[CheckpointWeights, ModelLosses] = {}
    problems: list[Veto] = []
    for number, weights in enumerate(candidates, 1):
        name = f"{describe_checkpoint(weights)} ({number} of {len(candidates)})"
        try:
            losses = meter.measure(weights)
        except ChangedWeightsError as error:
            if weights.is_final:
                raise
            losses, reason = None, str(error).removesuffix(". Materialize lora again")
        else:
            reason = "its eval loss is not finite"
        if losses is None or not losses.is_finite:
            context.reporter.log(f"The checkpoint of {name} is left out: {reason}.")
            if weights.weights == context.spec.lora.released_weights:
                problems.append(Veto(step=weights.step, reason=reason))
            continue
        measured[weights] = losses
        context.reporter.log(f"Eval loss of {name}: {_describe(losses)}.")
    if not any(weights.weights == context.spec.lora.released_weights for weights in measured):
        raise UserError(
            "The eval loss of every checkpoint is infinite or not a number: the training has diverged. Train again with a lower learning_rate"
        )
    return CheckpointSeries(base, measured, tuple(problems))


class _Meter:
    """Measures one model after the other on the same images, timesteps and noise."""

    def __init__(self, context: EvaluationContext) -> None:
        spec = context.spec
        scheduler = load_noise_scheduler(spec.base_model, spec.settings.scheduler_changes)
        self._context = context
        self._cache = LossCache(Path(spec.output_dir) / LOSSES_FOLDER)
        self._objective = Objective.plain(scheduler)
        self._timesteps = eval_timesteps(spec.settings.eval_timesteps, scheduler.config.num_train_timesteps)
        self._key = _measurement(spec, self._timesteps)
        self._sets = {"eval loss": context.samples} | (
            {"train probe": context.probe} if len(context.probe) else {}
        )
        self._digests = {name: samples.digest() for name, samples in self._sets.items()}

    def measure(self, weights: CheckpointWeights | None) -> ModelLosses:
        losses = {}
        for name, samples in self._sets.items():
            key = self._key | {"weights": weights and weights.sha256, "samples": self._digests[name]}
            losses[name] = self._cache.get(key, partial(self._loss, weights, name, samples))
        return ModelLosses(losses["eval loss"], losses.get("train probe"))

    def _loss(self, weights: CheckpointWeights | None, name: str, samples: Samples) -> LossSummary:
        context = self._context
        model = "base model" if weights is None else f"{context.label}, {describe_checkpoint(weights)}"

        def on_batch(done: int, total: int) -> None:
            context.reporter.progress(f"{name}, {model}", done, total, "pairs")
            context.stop.raise_if_requested()

        with context.active(weights):
            pipeline = context.eval_model.pipeline
            # read once per model, since each model may have its own text encoders
            images = load_eval_images(samples, context.reader, pipeline.vae.config.scaling_factor)
            batch_size = context.spec.settings.train_batch_size
            return eval_loss(pipeline.unet, self._objective, images, self._timesteps, batch_size, on_batch)


def _measurement(spec: EvaluateSpec, timesteps: Sequence[int]) -> dict[str, object]:
    """Return what a loss depends on besides weights and images."""
    return {
        "version": LOSS_VERSION,
        "base_model": spec.base_model.digest,
        "kind": spec.lora.weights_kind,
        "timesteps": list(timesteps),
        "scheduler": spec.base_model.scheduler_overrides | spec.settings.scheduler_changes,
        "precision": spec.settings.mixed_precision or spec.hardware.mixed_precision,
        "device": spec.hardware.device,
        "batch_size": spec.settings.train_batch_size,
        "text_encoder": spec.settings.train_text_encoder,
        "windows": text_windows(spec.datasets),
    }


def _describe(losses: ModelLosses) -> str:
    probe = f", train probe {losses.probe.mean:.5f}" if losses.probe is not None else ""
    return f"{losses.held_out.mean:.5f}{probe}"
