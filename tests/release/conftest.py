"""Fixtures of an evaluated LoRA and an evaluated UNet of the bundled model, ready to be released.

The weights are made once per process, and each test gets a copy of their files.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.report import write_report
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.models.base_model import ResolvedModel, resolve_base_model
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.release.export import build_release
from sdxl_pipeline.release.release_inputs import ReleaseInputs
from sdxl_pipeline.runtime.evaluation_report import ClipSummary, EvaluationReport, LossSummary
from sdxl_pipeline.runtime.specs import TrainedLora, ValidationImage
from tests.support.evaluation_specs import PROMPTS, make_lora, tiny_settings

LINEAGE = {
    "data_versions": {"demo/shapes_dataset": "d1", "demo/lora": "l1"},
    "base_model": "bundled:tiny-sdxl",
    "training_identity": "abc123",
}


def make_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    return path


def make_evaluation(folder: Path, lora: TrainedLora) -> EvaluationReport:
    images = []
    for seed, prompt in enumerate(PROMPTS):
        for step, kind in ((0, "base"), (lora.steps, "lora")):
            path = make_image(folder / "images" / kind / f"{prompt.name}.png", seed + step)
            images.append(
                ValidationImage(step=step, name=prompt.name, prompt=prompt.prompt, path=str(path), seed=7)
            )
    report = EvaluationReport(
        identity="0" * 64,
        reused=False,
        lora_sha256=lora.weights_sha256,
        eval_source="held-out share",
        eval_images=5,
        base_loss=LossSummary(mean=0.4, by_timestep=((125, 0.6), (875, 0.2))),
        lora_loss=LossSummary(mean=0.1, by_timestep=((125, 0.15), (875, 0.05))),
        base_clip=ClipSummary(min=10, max=30, mean=20, std=5),
        lora_clip=ClipSummary(min=15, max=35, mean=25, std=5),
        gallery_path=str(make_image(folder / "gallery.png", 50)),
        images=tuple(images),
        broken_images=(),
        loss_plot_path=str(make_image(folder / "loss_by_timestep.png", 51)),
        report_path=str(folder / "report.md"),
        change_since_release={"lora_loss": -0.02},
        seconds=1.5,
    )
    write_report(report, "demo", "bundled:tiny-clip")
    return report


def settings_in(folder: Path) -> TrainingSettings:
    return tiny_settings(
        pretrained_model_name_or_path="bundled:tiny-sdxl",
        output_dir=str(folder / "output"),
        logging_dir=str(folder / "logs"),
        instance_prompt="a zorp",
        model_card_note="Made for a test.",
        hub_model_id="someone/zorp",
    )


@pytest.fixture(scope="session")
def bundled_model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    folder = tmp_path_factory.mktemp("digests")
    return resolve_base_model(settings_in(folder), folder, cache_dir=folder)


@pytest.fixture(scope="session")
def made_lora(tmp_path_factory: pytest.TempPathFactory, bundled_model: ResolvedModel) -> TrainedLora:
    """Return a LoRA whose files no test may change."""
    folder = tmp_path_factory.mktemp("lora")
    return make_lora(folder, bundled_model, settings_in(folder), scale=0.1)


@pytest.fixture(scope="session")
def made_unet(tmp_path_factory: pytest.TempPathFactory, bundled_model: ResolvedModel) -> Path:
    """Return the folder of a trained UNet, which no test may change."""
    unet = load_unet(bundled_model, torch.float32)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.01)
    unet.register_to_config(_name_or_path="")
    folder = tmp_path_factory.mktemp("unet") / "unet"
    unet.save_pretrained(folder, max_shard_size="2MB")
    return folder


@pytest.fixture
def inputs(tmp_path: Path, bundled_model: ResolvedModel, made_lora: TrainedLora) -> dict[str, Any]:
    """Fields of ReleaseInputs for a LoRA."""
    run = Path(shutil.copytree(made_lora.run_dir, tmp_path / "run"))
    kohya = run / "demo.safetensors"
    kohya.write_bytes(b"kohya's format")  # the release copies the file without reading it
    lora = made_lora.model_copy(
        update={
            "run_dir": str(run),
            "weights_path": str(run / Path(made_lora.weights_path).name),
            "metrics_path": str(run / "metrics.jsonl"),
            "loss_curve_path": str(run / "loss.png"),
            "kohya_path": str(kohya),
            "trained_images": {"shapes": 24, "more": 1000},
            "held_out_images": {"shapes": 6, "validation": 3},
        }
    )
    make_image(Path(lora.loss_curve_path), 52)
    return {
        "project": "demo",
        "base_model": bundled_model,
        "settings": settings_in(tmp_path),
        "lora": lora,
        "report": make_evaluation(tmp_path / "evaluation", lora),
        "prompts": PROMPTS,
        "trigger_words": ["a zorp", "zorpy style"],
        "lineage": LINEAGE,
    }


@pytest.fixture
def unet_inputs(inputs: dict[str, Any], tmp_path: Path, made_unet: Path) -> dict[str, Any]:
    """The fields of `inputs` that differ for a trained UNet."""
    folder = Path(shutil.copytree(made_unet, tmp_path / "run" / "unet"))
    digest = sha256_path(folder)
    update = {
        "weights_kind": "unet",
        "weights_path": str(folder),
        "weights_sha256": digest,
        "kohya_path": None,
    }
    return {
        "lora": inputs["lora"].model_copy(update=update),
        "report": inputs["report"].model_copy(update={"weights_kind": "unet", "lora_sha256": digest}),
        "settings": inputs["settings"].model_copy(update={"model_type": "full"}),
    }


@pytest.fixture
def release(inputs: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that builds the release with some of the inputs changed."""

    def build(**changes: Any) -> Path:
        return build_release(tmp_path / "output" / "release", ReleaseInputs(**(inputs | changes)))

    return build
