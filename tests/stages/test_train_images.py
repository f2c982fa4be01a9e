"""The weights file of every kind of adapter gives, in its users' loader, the images of the trained model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.training.trainer import Trainer
from tests.models.adapted_unets import EVERY_KIND, KINDS
from tests.support.encoded_datasets import SilentReporter
from tests.support.training_datasets import NEGATIVE, PROMPT, make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "pytorch_lora_weights.safetensors"


def pipeline_of(spec: TrainSpec, unet: UNet2DConditionModel | None = None) -> StableDiffusionXLPipeline:
    parts = {} if unet is None else {"unet": unet}
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        spec.base_model.path, torch_dtype=torch.float32, **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def image(pipeline: StableDiffusionXLPipeline, embeds: dict[str, torch.Tensor]) -> np.ndarray:
    """Generate an image: (H, W, 3), float in [0, 1]."""
    pipeline.unet.eval()
    return pipeline(
        **embeds,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images[0]


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_trainer_export_in_users_loader_reproduces_image(tmp_path: Path, kind: str):
    spec = make_spec(
        tmp_path,
        make_dataset(tmp_path / "dataset"),
        max_train_steps=3,
        learning_rate=1e-2,
        lr_warmup_steps=0,
        **KINDS[kind],
    )
    Path(spec.run_dir).mkdir(parents=True)
    trainer = Trainer(spec, "0" * 64, SilentReporter(), StopSignal())
    trainer.train()
    trainer.export(tmp_path)
    conditioning = trainer.reader.conditioning(PROMPT, NEGATIVE, zeros_for_empty_prompt=False)
    embeds = {name: value.float() for name, value in vars(conditioning).items()}
    expected = image(pipeline_of(spec, trainer.unet_module), embeds)
    trainer.close()

    loaded = pipeline_of(spec)
    plain = image(loaded, embeds)
    if "lycoris_config" in KINDS[kind]:  # diffusers has no loader for these
        from lycoris import create_lycoris_from_weights

        network, _ = create_lycoris_from_weights(1.0, str(tmp_path / WEIGHTS), loaded.unet)
        network.apply_to()
    else:
        loaded.load_lora_weights(str(tmp_path), weight_name=WEIGHTS)
    assert np.abs(expected - plain).max() > 5e-3
    assert np.abs(image(loaded, embeds) - expected).max() <= 1e-4
