"""Builders of a LoRA with random weights and of the spec of its evaluation, without running the earlier stages."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.models.adapters.adapter import adapted_module_names, add_lora, save_adapter
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, ResolvedModel, resolve_base_model
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.specs import CheckpointWeights, TrainedLora, ValidationPrompt
from tests.support.training_datasets import make_dataset

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
            "num_probe_images": 2,
            "num_caption_samples": 0,
            "evaluation_type": "clip",
            "train_batch_size": 3,
            "lora_rank": 4,
        }
        | changes
    )


def tiny_model(settings: TrainingSettings, folder: Path) -> ResolvedModel:
    """Return the bundled architecture in `folder`/model with a random UNet, so that metrics do not depend on how it was trained."""
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


def make_lora(
    folder: Path, model: ResolvedModel, settings: TrainingSettings, scale: float = 0.0
) -> TrainedLora:
    """Return an exported LoRA whose updates have the size `scale`; with 0 it is untrained and changes nothing."""
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
    save_adapter({"unet": unet}, path)
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


def make_checkpoints(lora: TrainedLora, scales: Mapping[int, float]) -> tuple[CheckpointWeights, ...]:
    """Return checkpoints of `lora`'s run by step, whose updates are those of the final weights times a scale, and the final weights."""
    final = load_file(lora.weights_path)
    found = []
    for step, scale in scales.items():
        path = Path(lora.run_dir) / "checkpoints" / f"step-{step:08d}" / Path(lora.weights_path).name
        path.parent.mkdir(parents=True)
        with safe_open(lora.weights_path, framework="pt") as file:
            header = file.metadata()
        save_file(
            {name: value * scale if "lora_B" in name else value for name, value in final.items()},
            path,
            header,
        )
        found.append((step, path, sha256_file(path), False))
    found.append((lora.steps, Path(lora.weights_path), lora.weights_sha256, True))
    return tuple(
        CheckpointWeights(
            step=step,
            epochs=step / 20,
            samples=3 * step,
            weights="trained",
            path=str(path),
            sha256=digest,
            is_final=is_final,
        )
        for step, path, digest, is_final in found
    )


def make_evaluate_spec(
    folder: Path, scale: float = 0.0, prompts: tuple[ValidationPrompt, ...] = PROMPTS, **changes: object
) -> EvaluateSpec:
    """Return the spec of a complete evaluation: one dataset of six images, two of them held out."""
    settings = tiny_settings(**changes)
    model = tiny_model(settings, folder)
    splits = {f"{name}.png": "eval" if name in "ce" else "train" for name in "abcdef"}
    texts = [text for prompt in prompts for text in (prompt.prompt, prompt.negative_prompt)]
    return EvaluateSpec(
        base_model=model,
        hardware=PRESETS["cpu"],
        settings=settings,
        lora=make_lora(folder, model, settings, scale),
        datasets=(make_dataset(folder / "shapes", buckets=SIZES, splits=splits, prompts=texts),),
        prompts=prompts,
        output_dir=str(folder / "evaluation"),
    )
