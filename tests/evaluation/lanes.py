"""Lanes, a LoRA and specs as the earlier stages leave them, made without running those: random latents, texts and weights."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from diffusers import UNet2DConditionModel

from sdxl_pipeline.project.hardware import PRESETS
from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.protocol.specs import (
    EvaluateSpec,
    LatentCache,
    TextEmbedCache,
    TrainedLora,
    TrainingLane,
    ValidationPrompt,
)
from sdxl_pipeline.sdxl.adapters import adapted_module_names, add_lora, save_lora
from sdxl_pipeline.sdxl.base_model import BUNDLED_MODEL, ResolvedModel, resolve_base_model
from sdxl_pipeline.sdxl.components import load_unet
from sdxl_pipeline.store.digest import digest_json
from sdxl_pipeline.store.files import sha256_file
from sdxl_pipeline.store.tensor_store import TensorStore

SIZES = ((128, 128), (96, 160), (160, 96))
PROMPTS = (
    ValidationPrompt(name="circle", prompt="a red circle", negative_prompt="blurry"),
    ValidationPrompt(name="star", prompt="a blue star on a green background"),
)


def tiny_settings(**changes: object) -> TrainingSettings:
    return TrainingSettings.model_validate(
        {
            "pretrained_model_name_or_path": "model",
            "pretrained_evaluation_model_name_or_path": "bundled:tiny-clip",
            "validation_resolution": "64x64",
            "validation_num_inference_steps": 2,
            "validation_seed": 7,
            "eval_timesteps": 4,
            "evaluation_type": "clip",
            "train_batch_size": 3,
            "lora_rank": 4,
        }
        | changes
    )


def tiny_model(settings: TrainingSettings, folder: Path) -> ResolvedModel:
    """The bundled architecture in `folder`/model, its UNet with random weights, so that figures do not hang on how it was trained."""
    shutil.copytree(
        BUNDLED_MODEL, folder / "model", dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(BUNDLED_MODEL, subfolder="unet")
        )
        torch.nn.init.normal_(unet.conv_out.weight, std=0.02)
    unet.half().save_pretrained(folder / "model" / "unet")
    return resolve_base_model(settings, folder, cache_dir=folder / "digests")


def make_lane(
    folder: Path, dataset_id: str, splits: Mapping[str, str], prompts: Sequence[str] = ("blurry",)
) -> TrainingLane:
    """A dataset of one picture per entry of `splits` (path -> train | eval), with random latents in several sizes."""
    root = folder / dataset_id
    root.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(dataset_id))
    rows, latents, texts = [], [], []
    with (
        TensorStore(root / "latents").writer() as latent_store,
        TensorStore(root / "texts").writer() as text_store,
    ):
        for number, (path, split) in enumerate(splits.items()):
            h, w = SIZES[number % len(SIZES)]
            key = digest_json([dataset_id, path])
            latent_key, embed_key = digest_json(["latent", key]), digest_json(["text", key])
            sides = {
                "resized_h": h,
                "resized_w": w,
                "crop_top": 0,
                "crop_left": 0,
                "original_h": 3 * h,
                "original_w": 3 * w,
            }
            rows.append(
                {
                    "path": path,
                    "key": key,
                    "crop_index": 0,
                    "bucket_h": h,
                    "bucket_w": w,
                    "split": split,
                    **sides,
                }
            )
            latents.append({"path": path, "crop_index": 0, "key": key, "latent_key": latent_key})
            texts.append({"path": path, "key": key, "caption": f"picture {path}", "embed_key": embed_key})
            shape = (4, h // 8, w // 8)
            moments = {
                "mean": torch.randn(shape, generator=generator),
                "logvar": torch.full(shape, -4.0),
            }
            latent_store.add(latent_key, moments)
            text_store.add(embed_key, random_embeds(generator))
        prompt_rows = []
        for prompt in dict.fromkeys(["", *prompts]):
            embed_key = digest_json(["prompt", prompt])
            prompt_rows.append({"prompt": prompt, "embed_key": embed_key})
            text_store.add(embed_key, random_embeds(torch.Generator().manual_seed(len(prompt))))
    for name, table in (("rows", rows), ("latents", latents), ("texts", texts), ("prompts", prompt_rows)):
        pd.DataFrame(table).to_parquet(root / f"{name}.parquet")
    return TrainingLane(
        dataset_id=dataset_id,
        rows_path=str(root / "rows.parquet"),
        latents=LatentCache(
            identity="0" * 64,
            store_root=str(root / "latents"),
            entries_path=str(root / "latents.parquet"),
            digest="0" * 64,
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
            store_root=str(root / "texts"),
            entries_path=str(root / "texts.parquet"),
            prompts_path=str(root / "prompts.parquet"),
            digest="0" * 64,
            captions=len(rows),
            encoded=len(rows),
            reused=0,
            truncated=(),
            seconds=1.0,
            captions_per_second=1.0,
            bytes=1,
        ),
    )


def random_embeds(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Text embeddings of the bundled model's widths."""
    config = load_unet_config()
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "prompt_embeds": torch.randn(77, config["cross_attention_dim"], generator=generator),
        "pooled_prompt_embeds": torch.randn(pooled, generator=generator),
    }


def load_unet_config() -> dict[str, int]:
    config: dict[str, int] = json.loads((BUNDLED_MODEL / "unet" / "config.json").read_text())
    return config


def make_lora(
    folder: Path, model: ResolvedModel, settings: TrainingSettings, scale: float = 0.0
) -> TrainedLora:
    """An exported LoRA: as new, so that it changes nothing, or with updates of size `scale`."""
    unet = load_unet(model, torch.float32)
    add_lora(
        unet, settings.lora_rank, settings.effective_lora_alpha, 0.0, settings.lora_target_modules, seed=1
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    path = folder / "run" / "pytorch_lora_weights.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_lora(unet, path)
    modules = adapted_module_names(unet)
    return TrainedLora(
        identity="abc123",
        run_dir=str(path.parent),
        weights_path=str(path),
        weights_sha256=sha256_file(path),
        steps=40,
        epochs=2.0,
        samples=120,
        resumed_from_step=None,
        reused=False,
        final_loss=0.25,
        seconds=10.0,
        steps_per_second=4.0,
        peak_memory_bytes=1,
        trainable_parameters=sum(p.numel() for p in unet.parameters() if p.requires_grad),
        adapted_modules=len(modules),
        metrics_path=str(path.parent / "metrics.jsonl"),
        loss_curve_path=str(path.parent / "loss.png"),
        validation_sheet_path=None,
        validation_images=(),
    )


def make_spec(
    folder: Path, scale: float = 0.0, prompts: tuple[ValidationPrompt, ...] = PROMPTS, **changes: object
) -> EvaluateSpec:
    """A whole evaluation of the bundled model: one dataset of six pictures, two of them held out."""
    settings = tiny_settings(**changes)
    model = tiny_model(settings, folder)
    splits = {f"{name}.png": "eval" if name in "ce" else "train" for name in "abcdef"}
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)]
    return EvaluateSpec(
        base_model=model,
        hardware=PRESETS["cpu"],
        settings=settings,
        lora=make_lora(folder, model, settings, scale),
        lanes=(make_lane(folder, "shapes", splits, texts),),
        prompts=prompts,
        output_dir=str(folder / "evaluation"),
    )
