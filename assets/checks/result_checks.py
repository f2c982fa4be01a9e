"""What may go on: blocking checks stop the graph before money is spent and before shame is published.

Those of datasets and crop plans stand in assets.checks.data_checks.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import dagster as dg

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.files.atomic_files import sha256_file, sha256_path
from sdxl_pipeline.models.adapters.adapter_files import changes_something
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.runtime.specs import (
    KIND_LABELS,
    EvaluationReport,
    LatentCache,
    TextEmbedCache,
    TrainedLora,
)

WARNINGS = frozenset({"trained_as_configured", "not_worse_than_last_release"})
"""Checks that warn although their name does not begin with `may_`."""
JUDGED_FROM = 4
"""Held-out images from which on over-fitting can be judged."""
OVER_FITTING = f"The eval loss is measured on at least {JUDGED_FROM} images that were not trained on."


def specs(key: dg.AssetKey, **descriptions: str) -> list[dg.AssetCheckSpec]:
    """Return check specs by name; one of `WARNINGS`, or whose name begins with `may_`, warns; every other one blocks downstream assets."""
    return [
        dg.AssetCheckSpec(name, asset=key, description=text, blocking=not _warns(name))
        for name, text in descriptions.items()
    ]


def result(
    name: str, passed: bool, message: str, metadata: Mapping[str, Any] | None = None
) -> dg.AssetCheckResult:
    """Return a check's result with the severity that belongs to its name."""
    severity = dg.AssetCheckSeverity.WARN if _warns(name) else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(
        check_name=name, passed=passed, severity=severity, description=message, metadata=metadata
    )


def _warns(name: str) -> bool:
    return name.startswith("may_") or name in WARNINGS


def latent_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a latent cache."""
    return specs(
        key,
        latents_complete="Every planned crop has a latent, or is left to the training by the cache mode.",
        latents_sound="The latents are finite and not constant.",
    )


def check_latents(cache: LatentCache) -> list[dg.AssetCheckResult]:
    """Results of `latent_specs`."""
    named = "; ".join(f"{item.name}: {item.reason}" for item in cache.failed[:5])
    sound = all(math.isfinite(value) for value in cache.latent_mean) and all(
        math.isfinite(value) and value > 0 for value in cache.latent_std
    )
    accounted = cache.planned == cache.encoded + cache.reused + cache.deferred + len(cache.failed)
    return [
        result(
            "latents_complete",
            accounted and not cache.failed,
            f"{cache.planned} planned, {cache.encoded} encoded, {cache.reused} reused, {cache.deferred} deferred to the training, "
            f"{len(cache.failed)} failed."
            + (f" {named}. Mend or remove these files and materialize again." if named else ""),
        ),
        result(
            "latents_sound",
            sound,
            f"mean {cache.latent_mean}, standard deviation {cache.latent_std}, of {cache.measured} latents"
            if cache.measured
            else "None was looked at: the training encodes them, and refuses what is not finite.",
        ),
    ]


def text_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a text embedding cache."""
    return specs(
        key,
        may_fit_the_encoders="No caption is longer than the windows of 77 tokens that it is encoded in.",
    )


def check_text(cache: TextEmbedCache) -> list[dg.AssetCheckResult]:
    """Results of `text_specs`."""
    if cache.truncated_count is None:
        return [
            result("may_fit_the_encoders", True, "Not counted: captions are encoded during the training.")
        ]
    message = f"{cache.truncated_count} of {cache.captions} captions lose their tail."
    if cache.truncated_count:
        longer = 77 * min(cache.windows + 1, 3)
        message += (
            f' Write "tokenizer_max_length": {longer} in config.json to encode longer ones whole, or shorten them.'
            if cache.windows < 3
            else " Shorten them: tokenizer_max_length cannot be more than 231."
        )
    return [result("may_fit_the_encoders", not cache.truncated_count, message)]


_LOADS_EVERYWHERE: Final = (
    "Every tensor of every file has a name and a shape that its readers (diffusers; ComfyUI, A1111, Forge, kohya, InvokeAI) know, "
    "and the files do what was trained."
)


def lora_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a trained LoRA."""
    return specs(
        key,
        weights_sound="The weights have the recorded digest, and are finite; those of an adapter are not all zero.",
        may_load_everywhere=_LOADS_EVERYWHERE,
        trained_as_configured="The weights are those that config.json describes: the run did not override a setting that changes them.",
    )


def check_lora(
    lora: TrainedLora, base_model: ResolvedModel, settings: TrainingSettings
) -> list[dg.AssetCheckResult]:
    """Return the results of `lora_specs`; reads all weights."""
    return [
        _check_unet(lora) if lora.weights_kind == "unet" else _check_adapter(lora),
        check_formats("may_load_everywhere", lora, base_model, settings),
        _check_overrides(lora),
    ]


def _check_overrides(lora: TrainedLora) -> dg.AssetCheckResult:
    changes = "; ".join(
        f"{each.setting}: {each.used} instead of {each.configured}" for each in lora.overrides
    )
    return result(
        "trained_as_configured",
        not lora.overrides,
        f"Trained with {changes}. Materialize lora without overrides for the configured one; hub_release refuses this one unless its "
        f"`promote` names {lora.identity[:16]}."
        if lora.overrides
        else "No setting of the run changes the weights that config.json describes.",
    )


def _check_adapter(lora: TrainedLora) -> dg.AssetCheckResult:
    import numpy as np
    from safetensors.numpy import load_file  # a LoRA is float32: no torch is needed to look at it

    weights = load_file(lora.weights_path)
    unsound = [name for name, tensor in weights.items() if not np.isfinite(tensor).all()]
    changed = changes_something(weights)
    intact = sha256_file(Path(lora.weights_path)) == lora.weights_sha256
    return result(
        "weights_sound",
        intact and changed and not unsound,
        f"{len(weights)} tensors, digest {'as recorded' if intact else 'NOT as recorded'}, "
        f"{'changed by training' if changed else 'all zero: training changed nothing'}, "
        f"{len(unsound)} with NaN or Inf.",
    )


def check_formats(
    name: str, lora: TrainedLora, base_model: ResolvedModel, settings: TrainingSettings
) -> dg.AssetCheckResult:
    """Result of `may_load_everywhere` after training, or of `loads_everywhere` before the release."""
    from sdxl_pipeline.release.export import ExportError, verify_formats

    try:
        return result(name, True, verify_formats(lora, base_model, settings))
    except ExportError as error:
        return result(name, False, str(error))


def _check_unet(lora: TrainedLora) -> dg.AssetCheckResult:
    from sdxl_pipeline.release.unet_folder import non_finite_weights

    intact = sha256_path(Path(lora.weights_path)) == lora.weights_sha256
    weights, unsound = non_finite_weights(Path(lora.weights_path))
    return result(
        "weights_sound",
        intact and not unsound,
        f"{weights} weights, digest {'as recorded' if intact else 'NOT as recorded'}, {len(unsound)} with NaN or Inf.",
    )


def evaluation_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of an evaluation."""
    return specs(
        key,
        better_than_base="The trained model's eval loss is below the base model's by more than two standard errors, paired over images.",
        may_judge_over_fitting=OVER_FITTING,
        not_worse_than_last_release="The eval loss is not above the last release's by more than two standard errors, paired over images.",
        images_sound="No image drawn with the trained model is black, constant or not finite.",
        loads_everywhere=_LOADS_EVERYWHERE,
    )


def check_evaluation(report: EvaluationReport) -> list[dg.AssetCheckResult]:
    """Return the results of `evaluation_specs`."""
    broken = "; ".join(f"{item.name}: {item.reason}" for item in report.broken_images)
    return [
        _better_than_base(report),
        _judges_over_fitting(report),
        _not_worse_than_last_release(report),
        result("images_sound", not report.broken_images, broken or f"{len(report.images)} images are sound."),
    ]


def _better_than_base(report: EvaluationReport) -> dg.AssetCheckResult:
    name, difference = "better_than_base", report.difference_to_base
    if report.base_loss is None or report.lora_loss is None or difference is None:
        message = "Not measured: eval_loss_disable is true."
    else:
        message = (
            f"base {report.base_loss.mean:.4f}, {KIND_LABELS[report.weights_kind]} {report.lora_loss.mean:.4f} on "
            f"{report.eval_images} images ({report.eval_source}); difference {describe_difference(difference)}."
        )
        if difference.standard_error is not None:
            return result(name, difference.is_lower, message)
        message += (
            " Fewer than two images cannot show whether the training helped: add images, or an eval dataset."
        )
    # what cannot be judged is no failure of the weights, and no success either
    return dg.AssetCheckResult(
        check_name=name, passed=False, severity=dg.AssetCheckSeverity.WARN, description=message
    )


def _judges_over_fitting(report: EvaluationReport) -> dg.AssetCheckResult:
    trained_on = report.eval_source == "training images"
    return check_unseen_images(0 if trained_on or report.lora_loss is None else report.eval_images)


def check_unseen_images(unseen: int) -> dg.AssetCheckResult:
    """Return the result of `may_judge_over_fitting` for a number of images that are measured and not trained on."""
    message = f"The eval loss is measured on {unseen} images that are not trained on."
    if not unseen:
        message = "The eval loss is measured on images that are trained on, or not at all."
    if unseen < JUDGED_FROM:
        message += f" Fewer than {JUDGED_FROM} cannot judge over-fitting: add images, raise eval_holdout_share, or add an eval dataset."
    return result("may_judge_over_fitting", unseen >= JUDGED_FROM, message)


def _not_worse_than_last_release(report: EvaluationReport) -> dg.AssetCheckResult:
    name, difference = "not_worse_than_last_release", report.difference_to_release
    if difference is None:
        return result(name, True, "There is no earlier release, or no eval loss, to compare.")
    message = f"Difference to the last release: {describe_difference(difference)}."
    if difference.standard_error is None:
        return result(name, False, message + " Fewer than two images were measured in both: cannot judge.")
    return result(name, not difference.is_higher, message)
