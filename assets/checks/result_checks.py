"""Checks of caches, trained weights and evaluations. Those of datasets and crop plans are in assets.checks.data_checks."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import dagster as dg

from assets.checks.check import Check
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.files.atomic_files import sha256_file, sha256_path
from sdxl_pipeline.models.adapters.adapter_files import has_nonzero_update
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport
from sdxl_pipeline.runtime.specs import KIND_LABELS, LatentCache, TextEmbedCache, TrainedLora

MIN_EVAL_IMAGES: Final = 4
"""Smallest number of held-out images whose eval loss can show over-fitting."""

_FORMATS_VALID: Final = (
    "Every tensor of every file has a name and a shape that its readers (diffusers; ComfyUI, A1111, Forge, kohya, InvokeAI) know, "
    "and the files reproduce the trained weights."
)
_WORSE: Final = "by more than two standard errors, paired over images."

LATENTS_COMPLETE = Check(
    "latents_complete",
    "Every planned crop has a latent, or the cache mode leaves its encoding to the training.",
    blocking=True,
)
LATENTS_VALID = Check("latents_valid", "The latents are finite and not constant.", blocking=True)
CAPTIONS_NOT_TRUNCATED = Check(
    "captions_not_truncated",
    "No caption is longer than the windows of 77 tokens that it is encoded in.",
    blocking=False,
)
WEIGHTS_VALID = Check(
    "weights_valid",
    "The weights have the recorded digest and are finite; those of an adapter are not all zero.",
    blocking=True,
)
EXPORT_FORMATS_VALID = Check("export_formats_valid", _FORMATS_VALID, blocking=False)
TRAINED_AS_CONFIGURED = Check(
    "trained_as_configured",
    "The weights are those that config.json describes: the run did not override a setting that changes them.",
    blocking=False,
)
BETTER_THAN_BASE = Check(
    "better_than_base",
    f"The trained model's eval loss is below the base model's {_WORSE}",
    blocking=True,
)
ENOUGH_EVAL_IMAGES = Check(
    "enough_eval_images",
    f"The eval loss is measured on at least {MIN_EVAL_IMAGES} images that were not trained on.",
    blocking=False,
)
NOT_WORSE_THAN_LAST_RELEASE = Check(
    "not_worse_than_last_release",
    f"The eval loss is not above the last release's, and release_tolerance of it, {_WORSE}",
    blocking=False,
)
CHECKPOINT_SELECTED = Check(
    "checkpoint_selected",
    "The checkpoint is selected by the eval loss of held-out images, or by a released_checkpoint other than best, and no check vetoes it.",
    blocking=False,
)
NOT_OVERFITTED = Check(
    "not_overfitted",
    "The eval loss of held-out images does not rise while that of training images falls, up to the selected checkpoint.",
    blocking=False,
)
NOT_MEMORISED = Check(
    "not_memorised",
    "At most memorisation_limit of the images generated from training captions are copies of training images.",
    blocking=True,
)
IMAGES_VALID = Check(
    "images_valid",
    "No image generated with the trained model is black, constant or not finite.",
    blocking=True,
)
RELEASE_FORMATS_VALID = Check("release_formats_valid", _FORMATS_VALID, blocking=True)

LATENT_CHECKS = (LATENTS_COMPLETE, LATENTS_VALID)
LORA_CHECKS = (WEIGHTS_VALID, EXPORT_FORMATS_VALID, TRAINED_AS_CONFIGURED)
EVALUATION_CHECKS = (
    BETTER_THAN_BASE,
    ENOUGH_EVAL_IMAGES,
    NOT_WORSE_THAN_LAST_RELEASE,
    CHECKPOINT_SELECTED,
    NOT_OVERFITTED,
    NOT_MEMORISED,
    IMAGES_VALID,
    RELEASE_FORMATS_VALID,
)
"""All checks of the evaluation; `evaluation_checks` gives those of a project."""


def check_latents(cache: LatentCache) -> list[dg.AssetCheckResult]:
    """Return the results of `LATENT_CHECKS`."""
    failures = "; ".join(f"{item.name}: {item.reason}" for item in cache.failed[:5])
    valid = all(math.isfinite(value) for value in cache.latent_mean) and all(
        math.isfinite(value) and value > 0 for value in cache.latent_std
    )
    consistent = cache.planned == cache.encoded + cache.reused + cache.deferred + len(cache.failed)
    return [
        LATENTS_COMPLETE.result(
            consistent and not cache.failed,
            f"{cache.planned} planned, {cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred to the training, "
            f"{len(cache.failed)} failed."
            + (f" {failures}. Fix or remove these files and materialize again." if failures else ""),
        ),
        LATENTS_VALID.result(
            valid,
            f"mean {cache.latent_mean}, standard deviation {cache.latent_std}, of {cache.measured} latents"
            if cache.measured
            else "No latent was measured: the training encodes them and rejects non-finite ones.",
        ),
    ]


def check_text(cache: TextEmbedCache) -> list[dg.AssetCheckResult]:
    """Return the result of `CAPTIONS_NOT_TRUNCATED`."""
    if cache.truncated_count is None:
        return [CAPTIONS_NOT_TRUNCATED.result(True, "Not counted: captions are encoded during the training.")]
    message = f"{cache.truncated_count} of {cache.captions} captions are truncated."
    if cache.truncated_count:
        longer = 77 * min(cache.windows + 1, 3)
        message += (
            f' Write "tokenizer_max_length": {longer} in config.json to encode longer ones in full, or shorten them.'
            if cache.windows < 3
            else " Shorten them: tokenizer_max_length cannot be more than 231."
        )
    return [CAPTIONS_NOT_TRUNCATED.result(not cache.truncated_count, message)]


def check_lora(
    lora: TrainedLora, base_model: ResolvedModel, settings: TrainingSettings
) -> list[dg.AssetCheckResult]:
    """Return the results of `LORA_CHECKS`; reads all weights."""
    return [
        _check_unet(lora) if lora.weights_kind == "unet" else _check_adapter(lora),
        check_formats(EXPORT_FORMATS_VALID, lora, base_model, settings),
        _check_overrides(lora),
    ]


def check_formats(
    check: Check, lora: TrainedLora, base_model: ResolvedModel, settings: TrainingSettings
) -> dg.AssetCheckResult:
    """Return the result of `EXPORT_FORMATS_VALID` after training, or of `RELEASE_FORMATS_VALID` before the release."""
    from sdxl_pipeline.release.export import ExportError, verify_formats

    try:
        return check.result(True, verify_formats(lora, base_model, settings))
    except ExportError as error:
        return check.result(False, str(error))


def evaluation_checks(settings: TrainingSettings) -> tuple[Check, ...]:
    """Return the checks of a project's evaluation with the severities in its settings, without those of what it does not measure."""
    unmeasured = set()
    if settings.eval_loss_disable:
        unmeasured |= {CHECKPOINT_SELECTED, NOT_OVERFITTED}
    if not settings.num_probe_images:
        unmeasured.add(NOT_OVERFITTED)
    if not settings.num_caption_samples:
        unmeasured.add(NOT_MEMORISED)
    return tuple(
        check.configured(settings.evaluation_checks) for check in EVALUATION_CHECKS if check not in unmeasured
    )


def check_evaluation(report: EvaluationReport, settings: TrainingSettings) -> list[dg.AssetCheckResult]:
    """Return the results of `evaluation_checks`, without `RELEASE_FORMATS_VALID`; reads no files."""
    results: dict[str, Callable[[Check], dg.AssetCheckResult]] = {
        BETTER_THAN_BASE.name: lambda check: _better_than_base(check, report),
        ENOUGH_EVAL_IMAGES.name: lambda check: check_eval_images(_held_out_images(report), check),
        NOT_WORSE_THAN_LAST_RELEASE.name: lambda check: _not_worse_than_last_release(
            check, report, settings.release_tolerance
        ),
        CHECKPOINT_SELECTED.name: lambda check: _checkpoint_selected(check, report),
        NOT_OVERFITTED.name: lambda check: _not_overfitted(check, report),
        NOT_MEMORISED.name: lambda check: _not_memorised(check, report),
        IMAGES_VALID.name: lambda check: _images_valid(check, report),
    }
    return [results[check.name](check) for check in evaluation_checks(settings) if check.name in results]


def blocking_failures(results: Iterable[dg.AssetCheckResult]) -> list[dg.AssetCheckResult]:
    """Return the results that prevent a release."""
    return [
        result for result in results if not result.passed and result.severity is dg.AssetCheckSeverity.ERROR
    ]


def check_eval_images(held_out: int, check: Check = ENOUGH_EVAL_IMAGES) -> dg.AssetCheckResult:
    """Return the result of `ENOUGH_EVAL_IMAGES` for a number of images that are measured and not trained on."""
    message = f"The eval loss is measured on {held_out} images that are not trained on."
    if not held_out:
        message = "The eval loss is measured on images that are trained on, or not at all."
    if held_out < MIN_EVAL_IMAGES:
        message += f" Fewer than {MIN_EVAL_IMAGES} cannot show over-fitting: add images, raise eval_holdout_share, or add an eval dataset."
    return check.result(held_out >= MIN_EVAL_IMAGES, message)


def _check_overrides(lora: TrainedLora) -> dg.AssetCheckResult:
    changes = "; ".join(
        f"{each.setting}: {each.used} instead of {each.configured}" for each in lora.overrides
    )
    return TRAINED_AS_CONFIGURED.result(
        not lora.overrides,
        f"Trained with {changes}. Materialize lora without overrides for the configured one; hub_release rejects this one unless its "
        f"`promote` is {lora.identity[:16]}."
        if lora.overrides
        else "No setting of the run changes the weights that config.json describes.",
    )


def _check_adapter(lora: TrainedLora) -> dg.AssetCheckResult:
    import numpy as np
    from safetensors.numpy import load_file  # a LoRA is float32, so torch is not needed to read it

    weights = load_file(lora.weights_path)
    non_finite = [name for name, tensor in weights.items() if not np.isfinite(tensor).all()]
    changed = has_nonzero_update(weights)
    intact = sha256_file(Path(lora.weights_path)) == lora.weights_sha256
    return WEIGHTS_VALID.result(
        intact and changed and not non_finite,
        f"{len(weights)} tensors, digest {'as recorded' if intact else 'NOT as recorded'}, "
        f"{'changed by training' if changed else 'all zero: training changed nothing'}, "
        f"{len(non_finite)} with NaN or Inf.",
    )


def _check_unet(lora: TrainedLora) -> dg.AssetCheckResult:
    from sdxl_pipeline.release.unet_folder import non_finite_weights

    intact = sha256_path(Path(lora.weights_path)) == lora.weights_sha256
    weights, non_finite = non_finite_weights(Path(lora.weights_path))
    return WEIGHTS_VALID.result(
        intact and not non_finite,
        f"{weights} weights, digest {'as recorded' if intact else 'NOT as recorded'}, {len(non_finite)} with NaN or Inf.",
    )


def _held_out_images(report: EvaluationReport) -> int:
    trained_on = report.eval_source == "training images"
    return 0 if trained_on or report.lora_loss is None else report.eval_images


def _better_than_base(check: Check, report: EvaluationReport) -> dg.AssetCheckResult:
    difference = report.difference_to_base
    if report.base_loss is None or report.lora_loss is None or difference is None:
        return check.inconclusive("Not measured: eval_loss_disable is true.")
    message = (
        f"base {report.base_loss.mean:.4f}, {KIND_LABELS[report.weights_kind]} {report.lora_loss.mean:.4f} on "
        f"{report.eval_images} images ({report.eval_source}); difference {describe_difference(difference)}."
    )
    if difference.standard_error is None:
        return check.inconclusive(
            message
            + " Fewer than two images cannot show whether the training helped: add images, or an eval dataset."
        )
    return check.result(difference.is_lower, message)


def _not_worse_than_last_release(
    check: Check, report: EvaluationReport, tolerance: float
) -> dg.AssetCheckResult:
    difference = report.difference_to_release
    if difference is None or report.lora_loss is None:
        return check.result(True, "There is no earlier release, or no eval loss, to compare.")
    message = f"Difference to the last release: {describe_difference(difference)}."
    if difference.standard_error is None:
        return check.result(
            False, message + " Fewer than two images were measured in both: the difference is inconclusive."
        )
    allowed = tolerance * max(0.0, report.lora_loss.mean - difference.mean)
    if tolerance:
        message += f" The release_tolerance of {tolerance:g} allows {allowed:.5f}."
    beyond = difference.model_copy(update={"mean": difference.mean - allowed})
    return check.result(not beyond.is_higher, message)


def _checkpoint_selected(check: Check, report: EvaluationReport) -> dg.AssetCheckResult:
    selection = report.selected
    if selection is None:
        return check.inconclusive("The report does not describe a selection. Materialize evaluation again.")
    by_choice = selection.requested != "best"
    return check.result(
        not selection.vetoed and (by_choice or selection.best_step is not None), selection.text
    )


def _not_overfitted(check: Check, report: EvaluationReport) -> dg.AssetCheckResult:
    overfitting = report.overfitting
    if overfitting is None:
        return check.inconclusive("Over-fitting was not measured. Materialize evaluation again.")
    if not overfitting.conclusive:
        return check.inconclusive(overfitting.text)
    first = overfitting.from_step
    return check.result(first is None or report.step < first, overfitting.text)


def _not_memorised(check: Check, report: EvaluationReport) -> dg.AssetCheckResult:
    memorisation = report.memorisation
    if memorisation is None:
        return check.inconclusive("Memorisation was not measured. Materialize evaluation again.")
    return check.result(
        not memorisation.is_over_limit,
        memorisation.text,
        {"flagged": memorisation.flagged, "samples": memorisation.samples, "limit": memorisation.limit},
    )


def _images_valid(check: Check, report: EvaluationReport) -> dg.AssetCheckResult:
    broken = "; ".join(f"{item.name}: {item.reason}" for item in report.broken_images)
    return check.result(not report.broken_images, broken or f"{len(report.images)} images are valid.")
