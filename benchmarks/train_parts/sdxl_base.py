"""SDXL-base's architecture with random weights, created on the device. This module imports only torch, diffusers, transformers and peft."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks.train_parts.loops import BareLoop, ExampleModels, Tensors

_SDXL = Path(__file__).resolve().parents[2] / "sdxl_pipeline" / "models"
CONFIGS = _SDXL / "configs" / "sdxl-base-1.0"
TINY_CONFIGS = _SDXL / "tiny" / "model"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
RANK = 16
CAPTION = "a photograph of an astronaut riding a horse"

PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "4090": 165e12,
    "3090": 71e12,
}
"""Dense bf16 FLOP/s with float32 accumulation, by part of the device's name, from NVIDIA's data sheets."""


def random_unet(configs: Path, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """Return a UNet of random frozen weights with a LoRA in float32 on its attention projections."""
    unet = _from_config(UNet2DConditionModel, configs / "unet", device, dtype).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS))
    for parameter in trained_parameters(unet):
        parameter.data = parameter.data.float()
    return unet


def trained_parameters(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """Return the parameters of the adapter."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def example_models(
    unet: UNet2DConditionModel, configs: Path, device: torch.device, dtype: torch.dtype
) -> ExampleModels:
    """Return the models of diffusers' example: the UNet, the VAE in float32, its default, and both text encoders."""
    encoders = []
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        with device:
            encoders.append(kind(CLIPTextConfig.from_pretrained(configs / name)).to(dtype).eval())
    return ExampleModels(
        unet=unet,
        vae=_from_config(AutoencoderKL, configs / "vae", device, torch.float32).requires_grad_(False),
        tokenizers=tuple(
            CLIPTokenizer.from_pretrained(TINY_CONFIGS / name, local_files_only=True)
            for name in ("tokenizer", "tokenizer_2")
        ),
        text_encoders=tuple(encoders),
        scheduler=scheduler(configs),
    )


def scheduler(configs: Path) -> DDPMScheduler:
    """Return the noise schedule."""
    return DDPMScheduler.from_pretrained(configs / "scheduler")


def random_batch(
    unet: UNet2DConditionModel, size: int, resolution: int, device: torch.device, dtype: torch.dtype
) -> Tensors:
    """Return a batch on the device: square images of `resolution` pixels, captions of 77 tokens."""
    embedding = unet.config.projection_class_embeddings_input_dim
    pooled = embedding - 6 * unet.config.addition_time_embed_dim
    latents = (size, unet.config.in_channels, resolution // 8, resolution // 8)
    return Tensors(
        latents=torch.randn(latents, device=device),
        noise=torch.randn(latents, device=device),
        timesteps=torch.randint(0, 1000, (size,), device=device),
        prompt_embeds=torch.randn(size, 77, unet.config.cross_attention_dim, device=device, dtype=dtype),
        pooled_prompt_embeds=torch.randn(size, pooled, device=device, dtype=dtype),
        time_ids=torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * size, device=device).float(),
    )  # fmt: skip


def random_images(size: int, resolution: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Yield the same as pixels and captions, in unpinned CPU memory."""
    pixels = torch.rand(size, 3, resolution, resolution) * 2 - 1
    while True:
        yield pixels, [CAPTION] * size


def flops_per_step(loop: BareLoop, batch: Tensors) -> int:
    """Return the floating-point operations of one forward and backward pass without recomputation."""
    with FlopCounterMode(display=False) as counter:
        loop.loss(batch).backward()
    loop.optimizer.zero_grad()
    return counter.get_total_flops()


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak bf16 FLOP/s; None if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def _from_config(kind: Any, folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    with device:
        return kind.from_config(kind.load_config(folder)).to(dtype)
