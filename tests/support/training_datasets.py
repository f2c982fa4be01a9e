"""Datasets for trainer and evaluation without an encoding stage: tables and stores with generated latents and embeddings."""

import atexit
import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, resolve_base_model
from sdxl_pipeline.runtime.specs import (
    LatentCache,
    TextEmbedCache,
    TrainingDataset,
    TrainSpec,
    ValidationPrompt,
)
from sdxl_pipeline.training.data.samples import Sample, Samples

PROMPT, NEGATIVE = "a red circle", "blurry"
SQUARE, WIDE = (64, 64), (64, 96)  # (height, width), pixels
TEXT_WIDTH, POOLED_WIDTH = 128, 64  # of the bundled model

SETTINGS: Mapping[str, Any] = {
    "mixed_precision": "no",
    "gradient_checkpointing": False,
    "base_model_precision": "no_change",
    "vae_dtype": "fp32",
    "max_train_steps": 12,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "lora_rank": 2,
    "caption_dropout_probability": 0.0,
    "checkpoint_step_interval": 4,
    "validation_disable": True,
    "validation_resolution": "64x64",
    "validation_num_inference_steps": 2,
}


@lru_cache(maxsize=1)
def model_folder() -> Path:
    """Return the bundled model with random UNet weights, so that no test depends on what it was trained on.

    Created once per process and deleted at its end.
    """
    folder = Path(tempfile.mkdtemp(prefix="random-sdxl-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(BUNDLED_MODEL, folder, dirs_exist_ok=True)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(weights)
    for name, tensor in sorted(tensors.items()):
        if tensor.ndim > 1:
            scale = tensor[0].numel() ** -0.5
            tensors[name] = (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
    save_file(tensors, weights, {"format": "pt"})
    return folder


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def make_dataset(
    folder: Path,
    dataset_id: str = "shapes",
    buckets: Sequence[tuple[int, int]] = (SQUARE, SQUARE, SQUARE, WIDE, WIDE),
    captions: int = 1,
    repeats: int = 0,
    probability: float = 1.0,
    splits: Sequence[str] | Mapping[str, str] | None = None,
    crops: int = 1,
    prompts: Sequence[str] = (PROMPT, NEGATIVE),
) -> TrainingDataset:
    """Make a dataset with one image per entry of `buckets` and random tensors, each from its own seed.

    `splits` lists the split of each image, or maps paths to splits: then the images are its paths and `buckets` repeat. If there are several
    `crops` per image, every second one is mirrored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_path = (
        dict(splits)
        if isinstance(splits, Mapping)
        else {f"image_{i:02d}.png": splits[i] if splits else "train" for i in range(len(buckets))}
    )
    latent_store, text_store = TensorStore(folder / "latents"), TensorStore(folder / "texts")
    rows, latents, texts = [], [], []
    with latent_store.writer() as write_latent, text_store.writer() as write_text:

        def add_text(*name: object) -> str:
            key = digest("text", *name)
            generator = torch.Generator().manual_seed(int(key[:12], 16))
            write_text.add(
                key,
                {
                    "prompt_embeds": torch.randn(77, TEXT_WIDTH, generator=generator),
                    "pooled_prompt_embeds": torch.randn(POOLED_WIDTH, generator=generator),
                },
            )
            return key

        for index, (path, split) in enumerate(by_path.items()):
            height, width = buckets[index % len(buckets)]
            key = digest("image", dataset_id, index)
            for crop_index in range(crops):
                latent_key = digest("latent", key, *([crop_index] if crop_index else []))
                generator = torch.Generator().manual_seed(index + 1000 * crop_index)
                mean = torch.randn(4, height // 8, width // 8, generator=generator)
                write_latent.add(latent_key, {"mean": mean, "logvar": torch.full_like(mean, -4.0)})
                rows.append(
                    {
                        "path": path,
                        "key": key,
                        "crop_index": crop_index,
                        "bucket_h": height,
                        "bucket_w": width,
                        "resized_h": height + 4,
                        "resized_w": width,
                        "crop_top": index % 4,
                        "crop_left": 0,
                        "original_h": 3 * height + 12,
                        "original_w": 3 * width,
                        "source_h": 3 * height + 12,
                        "source_w": 3 * width,
                        "flipped": crop_index % 2 == 1,
                        "split": split,
                    }
                )
                latents.append({"path": path, "crop_index": crop_index, "key": key, "latent_key": latent_key})
            for number in range(captions):
                caption = f"{dataset_id} {index} {number}"
                texts.append(
                    {"path": path, "key": key, "caption": caption, "embed_key": add_text("caption", caption)}
                )
        prompt_rows = [
            {"prompt": p, "embed_key": add_text("prompt", p)} for p in dict.fromkeys(("", *prompts))
        ]

    for name, table in (("rows", rows), ("latents", latents), ("texts", texts), ("prompts", prompt_rows)):
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    return TrainingDataset(
        dataset_id=dataset_id,
        data_dir=str(folder / "images"),
        rows_path=str(folder / "rows.parquet"),
        repeats=repeats,
        probability=probability,
        latents=LatentCache(
            identity="0" * 64,
            store_root=str(folder / "latents"),
            entries_path=str(folder / "latents.parquet"),
            digest=digest(latents),
            planned=len(rows),
            encoded=len(rows),
            reused=0,
            failed=(),
            seconds=1.0,
            images_per_second=1.0,
            bytes=1,
            latent_mean=(0.0,) * 4,
            latent_std=(1.0,) * 4,
            sample_path=None,
        ),
        text_embeds=TextEmbedCache(
            identity="0" * 64,
            store_root=str(folder / "texts"),
            entries_path=str(folder / "texts.parquet"),
            prompts_path=str(folder / "prompts.parquet"),
            digest=digest(texts),
            captions=len(texts) + len(prompt_rows),
            encoded=len(texts) + len(prompt_rows),
            reused=0,
            truncated=(),
            seconds=1.0,
            captions_per_second=1.0,
            bytes=1,
        ),
    )


def by_path(samples: Samples) -> dict[str, Sample]:
    """Return samples of one crop each by path, sorted, which is the order of their creation."""
    return {sample.path: sample for sample in sorted(samples, key=lambda sample: sample.path)}


def make_spec(
    folder: Path, *datasets: TrainingDataset, num_processes: int = 1, run: str = "run", **settings: Any
) -> TrainSpec:
    """Make a spec with the model of `model_folder`; `settings` override SETTINGS."""
    effective = TrainingSettings(
        **{"pretrained_model_name_or_path": str(model_folder()), **SETTINGS, **settings}
    )
    return TrainSpec(
        base_model=resolve_base_model(effective, folder, cache_dir=folder / "digests"),
        hardware=PRESETS["cpu"].model_copy(update={"num_processes": num_processes}),
        settings=effective,
        datasets=datasets or (make_dataset(folder / "dataset"),),
        prompts=(ValidationPrompt(name="circle", prompt=PROMPT, negative_prompt=NEGATIVE),),
        run_dir=str(folder / run),
        project="small",
    )
