"""Header metadata of a released file: modelspec, kohya's entries and hashes.

The header has modelspec 1.0.1 (Stability AI's ModelSpec), the `ss_*` entries of kohya's trainer that A1111, Forge and LoRA managers
display, and the `sshs_*` hashes. It contains no paths, and captions and folder names only with `metadata_include_captions`. Dates are only
in the header, so equal training runs have equal tensors.
"""

import base64
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.stable_safetensors import tensors_sha256
from sdxl_pipeline.models.model_files import SCHEDULER_CONFIG
from sdxl_pipeline.release.release_inputs import adapter_name, portable_name
from sdxl_pipeline.runtime.specs import TrainedLora, TrainSpec
from sdxl_pipeline.training.data.samples import Samples, load_samples

if TYPE_CHECKING:
    from torch import Tensor

    from sdxl_pipeline.release.formats.layers import LayerParts

THUMBNAIL_EDGE: Final = 256
THUMBNAIL_BYTES: Final = 64 << 10
"""Upper limit for the complete data URI."""

_PREDICTION: Final = {"epsilon": "epsilon", "v_prediction": "v"}


def header_entries(spec: TrainSpec, manifest: TrainedLora, thumbnail: Path | None = None) -> dict[str, str]:
    """Return the entries that describe the training. They do not depend on the tensors, and the same training gives the same entries."""
    settings = spec.settings
    samples = load_samples(spec.datasets, "train", settings.micro_conditioning)
    buckets = _buckets(samples)
    (width, height), _ = buckets.most_common(1)[0]
    words = trigger_words(spec)
    entries: dict[str, Any] = {
        "base_model_sha256": spec.base_model.digest,
        "identity": manifest.identity,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": spec.project,
        "modelspec.description": f"{adapter_name(settings).partition(' ')[2]}, trained for {manifest.steps} steps.",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": _PREDICTION.get(_prediction_type(spec)),
        "modelspec.trigger_phrase": words[0] if words else None,
        "modelspec.thumbnail": thumbnail and thumbnail_uri(thumbnail),
        "trained_words": ", ".join(words) or None,
        "ss_output_name": spec.project,
        "ss_v2": False,
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": portable_name(spec.base_model.source),
        "ss_resolution": f"{width},{height}",
        "ss_bucket_info": json.dumps(
            {
                "buckets": {
                    str(number): {"resolution": list(size), "count": count}
                    for number, (size, count) in enumerate(sorted(buckets.items()))
                }
            }
        ),
        **_training_entries(spec, manifest, samples),
        **(_caption_entries(spec, samples) if settings.metadata_include_captions else {}),
    }
    return {name: str(value) for name, value in entries.items() if value is not None}


def trigger_words(spec: TrainSpec) -> list[str]:
    """Return the distinct instance prompts of the project and its datasets that occur in captions; regularisation datasets are ignored.

    An instance prompt that occurs in no caption was not trained: `caption_strategy` decides whether the captions contain it.
    """
    datasets = [dataset for dataset in spec.datasets if not dataset.is_regularisation]
    prompts = [
        (text or "").strip()
        for text in (spec.settings.instance_prompt, *(dataset.instance_prompt for dataset in datasets))
    ]
    candidates = [prompt for prompt in dict.fromkeys(prompts) if prompt]
    if not candidates:
        return []
    tables = [pd.read_parquet(dataset.text_embeds.entries_path, columns=["caption"]) for dataset in datasets]
    captions = pd.concat(tables)["caption"].astype("str").str.casefold()
    return [prompt for prompt in candidates if captions.str.contains(prompt.casefold(), regex=False).any()]


def thumbnail_uri(path: Path) -> str:
    """Return the image as a JPEG data URI of at most 256 x 256 pixels and 64 KiB, with its aspect ratio."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_EDGE, THUMBNAIL_EDGE))
    for quality in (90, 75, 50, 25):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(uri) < THUMBNAIL_BYTES:
            break
    return uri


def network_entries(
    settings: TrainingSettings, layers: "LayerParts", approximation_rank: int | None
) -> dict[str, str]:
    """Return kohya's entries for the kind, rank and alpha of the adapter in the file."""
    if approximation_rank is not None or settings.lora_type == "standard":
        rank = settings.lora_rank if approximation_rank is None else approximation_rank
        alpha = settings.effective_lora_alpha if approximation_rank is None else float(rank)
        entries: dict[str, Any] = {
            "ss_network_module": "networks.lora",
            "ss_network_dim": rank,
            "ss_network_alpha": alpha,
            "ss_network_dropout": settings.lora_dropout or None,
        }
        if any(len(layer.shape) == 4 and max(layer.shape[2:]) > 1 for layer in layers):
            entries["ss_network_args"] = json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)})
    else:
        lycoris = settings.lycoris
        arguments = {
            "algo": lycoris.algo,
            "conv_dim": lycoris.conv_dim or lycoris.linear_dim,
            "conv_alpha": lycoris.conv_alpha or lycoris.linear_alpha,
            "factor": lycoris.factor if "lokr" in lycoris.algorithms else None,
        }
        entries = {
            "ss_network_module": "lycoris.kohya",
            "ss_network_dim": lycoris.linear_dim,
            "ss_network_alpha": lycoris.linear_alpha,
            "ss_network_args": json.dumps(
                {name: str(value) for name, value in arguments.items() if value is not None}
            ),
        }
    return {name: str(value) for name, value in entries.items() if value is not None}


def approximation_entries(
    summary: Mapping[str, int | float], layer_errors: Mapping[str, float]
) -> dict[str, str]:
    """Return the entries with the error of a plain LoRA that approximates a weight-decomposed adapter, in total and by layer."""
    rounded = {name: float(f"{error:.3g}") for name, error in layer_errors.items()}
    return {
        "dora_approximation": json.dumps({**summary, "layer_errors": rounded}),
        "modelspec.usage_hint": (
            f"A plain LoRA of rank {summary['rank']} that approximates a weight-decomposed adapter (DoRA); relative error "
            f"{summary['relative_error']:.3g}. The exact adapter is the file in diffusers' format."
        ),
    }


def dates(manifest: TrainedLora, weights: Path) -> dict[str, str]:
    """Return the entries with the time at which the weights were written and, for an uninterrupted run, at which it started."""
    finished = weights.stat().st_mtime
    entries = {
        "modelspec.date": datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds"),
        "ss_training_finished_at": str(finished),
    }
    if manifest.resumed_from_step is None and manifest.ancestor is None:
        entries["ss_training_started_at"] = str(finished - manifest.seconds)
    return entries


def file_hashes(tensors: "Mapping[str, Tensor]", entries: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes by which other programs identify a file; only the legacy hash depends on the header, on its length."""
    from safetensors.torch import save

    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {name: value for name, value in entries.items() if name.startswith("ss_")},
    )
    digest = tensors_sha256(data)
    return {
        "sshs_model_hash": digest,
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_legacy_hash": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
    }


def _training_entries(spec: TrainSpec, manifest: TrainedLora, samples: Samples) -> dict[str, Any]:
    settings = spec.settings
    counts = samples.images_by_dataset()
    text_rate = settings.learning_rate if settings.text_encoder_lr is None else settings.text_encoder_lr
    regularisation = {dataset.dataset_id for dataset in spec.datasets if dataset.is_regularisation}
    return {
        "ss_steps": manifest.steps,
        "ss_max_train_steps": manifest.steps,
        "ss_epoch": f"{manifest.epochs:.3g}",
        "ss_num_train_images": sum(count for name, count in counts.items() if name not in regularisation),
        "ss_num_reg_images": sum(count for name, count in counts.items() if name in regularisation),
        "ss_learning_rate": settings.learning_rate,
        "ss_unet_lr": settings.learning_rate,
        "ss_text_encoder_lr": text_rate if settings.train_text_encoder else None,
        "ss_optimizer": settings.optimizer,
        "ss_lr_scheduler": settings.lr_scheduler,
        "ss_lr_warmup_steps": settings.lr_warmup_steps,
        "ss_total_batch_size": settings.train_batch_size * spec.hardware.num_processes,
        "ss_gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_mixed_precision": settings.mixed_precision,
        "ss_seed": settings.seed,
        "ss_max_grad_norm": settings.max_grad_norm,
        "ss_noise_offset": settings.noise_offset if settings.offset_noise else None,
        "ss_min_snr_gamma": settings.snr_gamma,
        "ss_caption_dropout_rate": settings.caption_dropout_probability,
        "ss_zero_terminal_snr": settings.rescale_betas_zero_snr or None,
    }


def _caption_entries(spec: TrainSpec, samples: Samples) -> dict[str, Any]:
    """Return the dataset folders' names and the frequency of each comma-separated tag in the training captions."""
    keys = samples.keys_by_dataset()
    folders: dict[str, dict[str, int]] = {}
    frequencies: dict[str, dict[str, int]] = {}
    for dataset in spec.datasets:
        if dataset.dataset_id not in keys:
            continue
        name = Path(dataset.data_dir).name
        name = name if name not in folders else f"{name} ({dataset.dataset_id})"
        table = pd.read_parquet(dataset.text_embeds.entries_path, columns=["key", "caption"])
        captions = table[table["key"].isin(keys[dataset.dataset_id])]["caption"]
        tags = (tag.strip() for caption in captions for tag in str(caption).split(","))
        folders[name] = {
            "n_repeats": dataset.repeats + 1,
            "img_count": samples.images_by_dataset()[dataset.dataset_id],
        }
        frequencies[name] = dict(Counter(tag for tag in tags if tag).most_common())
    return {
        "ss_dataset_dirs": json.dumps(folders, ensure_ascii=False),
        "ss_tag_frequency": json.dumps(frequencies, ensure_ascii=False),
    }


def _buckets(samples: Samples) -> Counter[tuple[int, int]]:
    """Return the number of crops in each bucket, by (width, height)."""
    codes, sizes = samples.buckets
    counts = np.bincount(codes, minlength=len(sizes)).tolist()
    return Counter({(width, height): count for (height, width), count in zip(sizes, counts, strict=True)})


def _prediction_type(spec: TrainSpec) -> str:
    config = json.loads((Path(spec.base_model.config_path) / SCHEDULER_CONFIG).read_text(encoding="utf-8"))
    merged = config | spec.base_model.scheduler_overrides | spec.settings.scheduler_changes
    return str(merged.get("prediction_type", "epsilon"))
