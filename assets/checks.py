"""What may go on: blocking checks stop the graph before money is spent and before shame is published."""

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from sdxl_pipeline.protocol.specs import EvaluationReport, LatentCache, TextEmbedCache, TrainedLora
from sdxl_pipeline.store.files import sha256_file

if TYPE_CHECKING:
    import pandas as pd

MISSING_CAPTIONS_LIMIT = 0.2
"""Share of pictures without a caption from which a dataset is taken for a mistake rather than for a gap."""


def specs(key: dg.AssetKey, **descriptions: str) -> list[dg.AssetCheckSpec]:
    """Check specs by name; a name that begins with `may_` warns, every other one blocks what stands downstream."""
    return [
        dg.AssetCheckSpec(name, asset=key, description=text, blocking=not name.startswith("may_"))
        for name, text in descriptions.items()
    ]


def _result(name: str, passed: bool, message: str) -> dg.AssetCheckResult:
    severity = dg.AssetCheckSeverity.WARN if name.startswith("may_") else dg.AssetCheckSeverity.ERROR
    return dg.AssetCheckResult(check_name=name, passed=passed, severity=severity, description=message)


def dataset_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a scanned dataset."""
    return specs(
        key,
        usable_pictures="At least one picture can be trained on.",
        captions_present=f"At most {MISSING_CAPTIONS_LIMIT:.0%} of the pictures lack a caption.",
        files_accounted_for="Files found = kept + dropped, and every dropped one has a reason.",
    )


def check_dataset(scanned: "pd.DataFrame", allows_missing: bool) -> list[dg.AssetCheckResult]:
    """Results of `dataset_specs`. `allows_missing`: the user chose to train pictures without a caption."""
    kept = scanned[scanned["status"] == "kept"]
    dropped = scanned[scanned["status"] == "dropped"]
    # Only pictures have a caption status; other files have none.
    uncaptioned = scanned[~scanned["caption_status"].isin(["", "ok"])]
    captionable = len(kept) + int((uncaptioned["status"] == "dropped").sum())
    share = len(uncaptioned) / captionable if captionable else 0.0
    remedy = 'Add the captions, or write "missing_captions": "empty" to train these pictures without text.'
    unexplained = int((dropped["reason"] == "").sum())
    return [
        _result("usable_pictures", len(kept) > 0, f"{len(kept)} of {len(scanned)} files are kept."),
        _result(
            "captions_present",
            allows_missing or share <= MISSING_CAPTIONS_LIMIT,
            f"{len(uncaptioned)} of {captionable} pictures ({share:.0%}) have no usable caption."
            + ("" if share == 0 else f" {remedy}"),
        ),
        _result(
            "files_accounted_for",
            len(scanned) == len(kept) + len(dropped) and unexplained == 0,
            f"{len(scanned)} found, {len(kept)} kept, {len(dropped)} dropped, {unexplained} without a reason.",
        ),
    ]


def bucket_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a crop plan."""
    return specs(
        key,
        crops_planned="At least one picture passes the size and aspect filters.",
        pictures_accounted_for="Pictures kept by the dataset = pictures planned + pictures filtered out.",
        may_fill_a_batch="Every bucket holds a full batch; shorter ones are filled by repeating their pictures.",
    )


def check_buckets(
    rows: "pd.DataFrame", dropped: "pd.DataFrame", pictures: int, batch_size: int
) -> list[dg.AssetCheckResult]:
    """Results of `bucket_specs`; `pictures` is what the dataset kept."""
    train = rows[rows["split"] == "train"]
    sizes = Counter(zip(train["bucket_h"], train["bucket_w"], strict=True))
    short = [f"{width}x{height} ({n})" for (height, width), n in sorted(sizes.items()) if n < batch_size]
    planned = rows["path"].nunique()
    return [
        _result("crops_planned", len(rows) > 0, f"{len(rows)} crops of {pictures} pictures."),
        _result(
            "pictures_accounted_for",
            planned + len(dropped) == pictures,
            f"{pictures} pictures: {planned} planned, {len(dropped)} filtered out.",
        ),
        _result(
            "may_fill_a_batch",
            not short,
            f"Buckets with fewer pictures than a batch of {batch_size}: {', '.join(short) or 'none'}.",
        ),
    ]


def latent_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a latent cache."""
    return specs(
        key,
        latents_complete="Every planned crop has a latent.",
        latents_sound="The latents are finite and not constant.",
    )


def check_latents(cache: LatentCache) -> list[dg.AssetCheckResult]:
    """Results of `latent_specs`."""
    named = "; ".join(f"{item.name}: {item.reason}" for item in cache.failed[:5])
    sound = all(math.isfinite(value) for value in cache.latent_mean) and all(
        math.isfinite(value) and value > 0 for value in cache.latent_std
    )
    return [
        _result(
            "latents_complete",
            cache.planned == cache.encoded + cache.reused and not cache.failed,
            f"{cache.planned} planned, {cache.encoded} encoded, {cache.reused} reused, {len(cache.failed)} failed."
            + (f" {named}. Mend or remove these files and materialize again." if named else ""),
        ),
        _result("latents_sound", sound, f"mean {cache.latent_mean}, standard deviation {cache.latent_std}"),
    ]


def text_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a text embedding cache."""
    return specs(key, may_fit_the_encoders="No caption is longer than the encoders' 77 tokens.")


def check_text(cache: TextEmbedCache) -> list[dg.AssetCheckResult]:
    """Results of `text_specs`."""
    cut = len(cache.truncated)
    return [_result("may_fit_the_encoders", cut == 0, f"{cut} of {cache.captions} captions lose their tail.")]


def lora_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of a trained LoRA."""
    return specs(
        key,
        weights_sound="The file has the recorded digest, and its tensors are finite and not all zero.",
    )


def check_lora(lora: TrainedLora) -> list[dg.AssetCheckResult]:
    """Results of `lora_specs`; reads the whole file."""
    import numpy as np
    from safetensors.numpy import load_file  # a LoRA is float32: no torch is needed to look at it

    weights = load_file(lora.weights_path)
    unsound = [name for name, tensor in weights.items() if not np.isfinite(tensor).all()]
    changed = any(
        bool(tensor.any()) for name, tensor in weights.items() if ".lora_B." in name or ".lora.up." in name
    )
    intact = sha256_file(Path(lora.weights_path)) == lora.weights_sha256
    return [
        _result(
            "weights_sound",
            intact and changed and not unsound,
            f"{len(weights)} tensors, digest {'as recorded' if intact else 'NOT as recorded'}, "
            f"{'changed by training' if changed else 'all zero: training changed nothing'}, "
            f"{len(unsound)} with NaN or Inf.",
        )
    ]


def evaluation_specs(key: dg.AssetKey) -> list[dg.AssetCheckSpec]:
    """Checks of an evaluation."""
    return specs(
        key,
        better_than_base="The LoRA's eval loss is below the base model's.",
        pictures_sound="No picture drawn with the LoRA is black, constant or not finite.",
    )


def check_evaluation(report: EvaluationReport) -> list[dg.AssetCheckResult]:
    """Results of `evaluation_specs`."""
    if report.base_loss is None or report.lora_loss is None:
        better, message = True, "The eval loss was switched off by eval_loss_disable."
    else:
        better = report.lora_loss.mean < report.base_loss.mean
        message = f"base {report.base_loss.mean:.4f}, LoRA {report.lora_loss.mean:.4f} on {report.eval_images} pictures ({report.eval_source})."
    broken = "; ".join(f"{item.name}: {item.reason}" for item in report.broken_images)
    return [
        _result("better_than_base", better, message),
        _result(
            "pictures_sound", not report.broken_images, broken or f"{len(report.images)} pictures are sound."
        ),
    ]
