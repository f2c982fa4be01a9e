"""LoRA: target layers, unchanged initial output, dependence on the seed only, and deterministic files that load back."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from sdxl_pipeline.config.schema.adapter import ATTENTION_PROJECTIONS
from sdxl_pipeline.config.validators.adapter_rules import CONVOLUTIONS
from sdxl_pipeline.models.adapters.adapter import (
    AdapterError,
    adapted_module_names,
    adapter_parameters,
    add_lora,
    load_adapter,
    save_adapter,
)
from sdxl_pipeline.models.base_model import SDXL_BASE_CONFIGS, ResolvedModel
from sdxl_pipeline.models.components import load_pipeline, load_unet
from sdxl_pipeline.models.precision import quantize_model


def unet_with_lora(
    model: ResolvedModel, rank: int = 4, alpha: float = 4, seed: int = 0, trained: bool = True
) -> UNet2DConditionModel:
    """Return a UNet with an adapter whose B matrices are nonzero, as after training."""
    unet = load_unet(model, torch.float32)
    add_lora(unet, rank, alpha, 0.0, ATTENTION_PROJECTIONS, seed)
    if trained:
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter_parameters(unet):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return unet


@torch.no_grad()
def output(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    conditioning = {
        "text_embeds": torch.randn(1, 64, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]),
    }
    return unet(
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 77, 128, generator=generator),
        added_cond_kwargs=conditioning,
    ).sample


def test_add_lora_adapts_560_attention_projections_of_sdxl_base():
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(
            json.loads((SDXL_BASE_CONFIGS / "unet" / "config.json").read_text())
        )
        parameters = add_lora(unet, 16, 16, 0.0, ATTENTION_PROJECTIONS, seed=0)
    names = adapted_module_names(unet)
    # 70 transformer blocks, each with two attentions of four projections
    assert len(names) == 560
    assert len(parameters) == 2 * 560
    assert sum(parameter.numel() for parameter in parameters) == 23_224_320
    assert names[0] == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k"
    assert {name.rsplit("attn", 1)[1] for name in names} == {
        f"{attention}.{projection}" for attention in (1, 2) for projection in ATTENTION_PROJECTIONS
    }


def test_convolution_names_of_the_config_match_sdxls_unet():
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(
            json.loads((SDXL_BASE_CONFIGS / "unet" / "config.json").read_text())
        )
    convolutions = [name for name, module in unet.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert {name.rpartition(".")[2] for name in convolutions} == set(CONVOLUTIONS)


def test_add_lora_trains_only_the_adapter_and_starts_unchanged(random_filled: ResolvedModel):
    unet = load_unet(random_filled, torch.bfloat16)
    names = [
        name for name, module in unet.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    parameters = add_lora(unet, 4, 8, 0.0, ATTENTION_PROJECTIONS, seed=0)
    assert adapted_module_names(unet) == sorted(names)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(p.dtype == torch.float32 for p in parameters)
    untouched = load_unet(random_filled, torch.float32)
    assert torch.equal(output(unet_with_lora(random_filled, trained=False)), output(untouched))


def test_initial_adapter_depends_only_on_the_seed(random_filled: ResolvedModel):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = adapter_parameters(unet_with_lora(random_filled, trained=False))
    assert torch.equal(torch.get_rng_state(), state), "the global random state is unchanged"
    torch.manual_seed(2)
    again = adapter_parameters(unet_with_lora(random_filled, trained=False))
    other = adapter_parameters(unet_with_lora(random_filled, seed=1, trained=False))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_add_lora_with_an_unmatched_target_raises(random_filled: ResolvedModel):
    with pytest.raises(AdapterError, match=r"'to_qkv'.*to_q, to_k"):
        add_lora(load_unet(random_filled, torch.float32), 4, 4, 0.0, ["to_k", "to_qkv"], seed=0)


@pytest.mark.parametrize(
    ("rank", "alpha"),
    [
        (4, 4),
        (3, 7.5),
        pytest.param(4, 1.0, marks=pytest.mark.slow),
        pytest.param(8, 16, marks=pytest.mark.slow),
    ],
)
def test_saved_lora_loads_in_diffusers_with_its_alpha(
    random_filled: ResolvedModel, tmp_path: Path, rank, alpha
):
    trained = unet_with_lora(random_filled, rank, alpha)
    expected = output(trained)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_adapter({"unet": trained}, path, {"note": "anything"})

    pipeline = load_pipeline(random_filled, torch.float32)
    before = output(pipeline.unet)
    assert not torch.allclose(before, expected, atol=1e-3)
    pipeline.load_lora_weights(str(tmp_path))
    assert torch.equal(output(pipeline.unet), expected)
    pipeline.unload_lora_weights()
    assert torch.equal(output(pipeline.unet), before)

    unet = load_unet(random_filled, torch.float32)
    assert load_adapter({"unet": unet}, path)["unet"] == adapted_module_names(trained)
    assert torch.equal(output(unet), expected)
    save_adapter({"unet": unet}, tmp_path / "again.safetensors", {"note": "anything"})
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_save_adapter_uses_diffusers_tensor_names(random_filled: ResolvedModel, tmp_path: Path):
    unet = unet_with_lora(random_filled)
    save_adapter({"unet": unet}, tmp_path / "lora.safetensors", {"b": "2", "a": "1"})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {
        f"unet.{name}.lora_{letter}.weight" for name in adapted_module_names(unet) for letter in "AB"
    }
    assert metadata["format"] == "pt"
    assert (metadata["a"], metadata["b"]) == ("1", "2")


@pytest.mark.slow
def test_save_adapter_is_deterministic_across_processes(tmp_path: Path):
    program = """
import sys
from pathlib import Path
from tests.models.adapters.test_adapter import unet_with_lora
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.adapters.adapter import save_adapter
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
model = resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), Path("."), Path(sys.argv[1]).parent)
save_adapter({'unet': unet_with_lora(model)}, Path(sys.argv[1]), {str(number): "x" for number in range(20)})
"""
    digests = set()
    for index in range(2):
        path = tmp_path / f"{index}.safetensors"
        subprocess.run([sys.executable, "-c", program, str(path)], check=True)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_load_adapter_reads_kohya_files(random_filled: ResolvedModel, tmp_path: Path):
    from diffusers.utils import convert_state_dict_to_kohya
    from safetensors.torch import load_file, save_file

    trained = unet_with_lora(random_filled, rank=4, alpha=4)
    save_adapter({"unet": trained}, tmp_path / "lora.safetensors")
    peft = {
        name.replace("unet.", "base_model.model.", 1): tensor
        for name, tensor in load_file(tmp_path / "lora.safetensors").items()
    }
    kohya = {
        name.replace("lora_te", "lora_unet"): tensor
        for name, tensor in convert_state_dict_to_kohya(peft).items()
    }
    kohya = {name.replace("base_model_model_", "lora_unet_"): tensor for name, tensor in kohya.items()}
    save_file(kohya, tmp_path / "kohya.safetensors")
    unet = load_unet(random_filled, torch.float32)
    assert load_adapter({"unet": unet}, tmp_path / "kohya.safetensors")["unet"] == adapted_module_names(
        trained
    )
    torch.testing.assert_close(output(unet), output(trained))


def test_load_adapter_without_unet_layers_raises(random_filled: ResolvedModel, tmp_path: Path):
    from safetensors.torch import save_file

    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "text.safetensors")
    with pytest.raises(AdapterError, match=r"text\.safetensors contains no LoRA for the UNet"):
        load_adapter({"unet": load_unet(random_filled, torch.float32)}, tmp_path / "text.safetensors")


def test_add_lora_on_a_quantized_unet_gives_gradients(random_filled: ResolvedModel):
    pytest.importorskip("optimum.quanto")
    unet = load_unet(random_filled, torch.float32)
    quantize_model(unet, "int8-quanto")
    parameters = add_lora(unet, 4, 4, 0.0, ATTENTION_PROJECTIONS, seed=0)
    assert len(adapted_module_names(unet)) == len(adapted_module_names(unet_with_lora(random_filled)))
    generator = torch.Generator().manual_seed(5)
    prediction = unet(
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 77, 128, generator=generator),
        added_cond_kwargs={"text_embeds": torch.zeros(1, 64), "time_ids": torch.zeros(1, 6)},
    ).sample
    prediction.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in parameters)
    assert any(parameter.grad.abs().max() > 0 for parameter in parameters)
