"""UNets of the bundled model with adapters of every kind, trained for a few steps, for tests of their files."""

from collections.abc import Mapping
from typing import Any, Final

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import adapter_parameters, add_adapter
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_unet

ATTENTION: Final = {"target_module": ["Attention"]}
CONVOLUTIONS: Final = {"target_module": ["ResnetBlock2D"]}


def lycoris(algo: str, **config: Any) -> dict[str, Any]:
    return {
        "lora_type": "lycoris",
        "lycoris_config": {"algo": algo, "linear_dim": 4, "linear_alpha": 1, "apply_preset": ATTENTION}
        | config,
    }


KINDS: Final[Mapping[str, Mapping[str, Any]]] = {
    "lora": {"lora_rank": 4},
    "lora, alpha above rank": {"lora_rank": 4, "lora_alpha": 10},
    "lora, gaussian, convolutions": {
        "lora_rank": 4,
        "lora_init_type": "gaussian",
        "lora_target_modules": ["to_q", "conv1", "conv_shortcut", "proj_in", "conv_in"],
    },
    "dora": {"lora_rank": 4, "lora_alpha": 2, "use_dora": True},
    "dora, convolutions": {"lora_rank": 4, "use_dora": True, "lora_target_modules": ["to_v", "conv2"]},
    "lokr": lycoris("lokr", factor=4),
    "lokr, whole matrices": lycoris(
        "lokr",
        linear_dim=10000,
        factor=12,
        bypass_mode=True,
        apply_preset={"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 12}}},
    ),
    "lokr, both factors, weights rebuilt": lycoris("lokr", factor=8, linear_dim=2, decompose_both=True, bypass_mode=False),
    "lokr, norms": lycoris("lokr", factor=4, dora_wd=True),
    "lokr, convolutions": lycoris("lokr", factor=4, apply_preset=CONVOLUTIONS),
    "loha": lycoris("loha"),
    "loha, weights rebuilt, scalar": lycoris("loha", bypass_mode=False, use_scalar=True),
    "loha, convolutions": lycoris("loha", conv_dim=2, conv_alpha=2, apply_preset=CONVOLUTIONS),
    "loha, tucker": lycoris("loha", use_tucker=True, apply_preset=CONVOLUTIONS),
    "lycoris lora": lycoris("lora"),
    "locon": lycoris("locon", linear_alpha=8, apply_preset=CONVOLUTIONS),
    "locon, by name": lycoris("locon", apply_preset={"target_name": ["conv_in", "time_embedding.linear_1"]}),
    "loha and lokr": lycoris(
        "loha",
        apply_preset={
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"FeedForward": {"algo": "lokr", "factor": 8, "dim": 2}},
        },
    ),
}  # fmt: skip

_DEFAULT_KINDS = (
    "lora, alpha above rank",
    "dora",
    "lokr",
    "lokr, norms",
    "loha",
    "locon",
)
EVERY_KIND: Final = [
    pytest.param(kind, id=kind, marks=() if kind in _DEFAULT_KINDS else pytest.mark.slow) for kind in KINDS
]
"""For `parametrize`: variants of a kind that is already covered are slow tests."""


def settings_of(kind: str, **more: Any) -> TrainingSettings:
    return TrainingSettings.model_validate({**KINDS[kind], **more})


def predict(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the UNet's output for fixed inputs, (1, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(5)
    conditioning = {
        "text_embeds": torch.randn(1, 64, generator=generator).to(dtype),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    return unet(
        torch.randn(1, 4, 8, 8, generator=generator).to(dtype),
        torch.tensor([500]),
        torch.randn(1, 77, 128, generator=generator).to(dtype),
        added_cond_kwargs=conditioning,
    ).sample


@torch.no_grad()
def output(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    unet.eval()
    return predict(unet, dtype)


def train(unet: UNet2DConditionModel, steps: int = 3) -> None:
    """Take some optimizer steps towards an output of ones."""
    unet.train()
    optimizer = torch.optim.AdamW(adapter_parameters(unet), lr=1e-2)
    for _ in range(steps):
        (predict(unet) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


_SHARED: dict[tuple[str, str], UNet2DConditionModel] = {}


def shared_unet(model: ResolvedModel, kind: str) -> UNet2DConditionModel:
    """Return the `adapted_unet` of a kind, trained once per process; callers must not change it."""
    key = (model.digest, kind)
    if key not in _SHARED:
        _SHARED[key] = adapted_unet(model, settings_of(kind))
    return _SHARED[key]


def adapted_unet(model: ResolvedModel, settings: TrainingSettings, steps: int = 2) -> UNet2DConditionModel:
    """Return the UNet with the adapter of the settings after some training steps."""
    unet = load_unet(model, torch.float32)
    add_adapter(unet, settings, seed=0)
    train(unet, steps)
    return unet
