"""Adapters of every kind: an unchanged initial output that depends on the seed only, files that load back as the trained model in their
users' own loader, and errors with the reason.
"""

import hashlib
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.validators.adapter_rules import DORA_PRECISIONS
from sdxl_pipeline.models.adapters.adapter import (
    UNET,
    AdapterError,
    adapted_module_names,
    adapter_kind,
    adapter_parameters,
    add_adapter,
    load_adapter,
    require_complete,
    save_adapter,
    without_adapter,
)
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_pipeline, load_unet
from sdxl_pipeline.models.precision import quantize_model
from tests.models.adapted_unets import (
    ATTENTION,
    EVERY_KIND,
    KINDS,
    adapted_unet,
    lycoris,
    output,
    settings_of,
    shared_unet,
    train,
)

LYCORIS = [kind for kind, settings in KINDS.items() if "lycoris_config" in settings]
PEFT = [kind for kind in KINDS if kind not in LYCORIS]


@pytest.fixture(scope="module")
def plain(random_filled: ResolvedModel) -> torch.Tensor:
    return output(load_unet(random_filled, torch.float32))


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_saved_adapter_loads_in_its_users_loader_as_the_trained_model(
    random_filled: ResolvedModel, plain: torch.Tensor, tmp_path: Path, kind: str
):
    trained = shared_unet(random_filled, kind)
    expected = output(trained)
    assert (expected - plain).abs().max() > 1e-3
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_adapter({UNET: trained}, path, {"note": "anything"})

    pipeline = load_pipeline(random_filled, torch.float32)
    if kind in LYCORIS:  # the usage in the model card
        from lycoris import create_lycoris_from_weights

        network, _ = create_lycoris_from_weights(1.0, str(path), pipeline.unet)
        network.apply_to()
    else:
        pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(output(pipeline.unet), expected, rtol=0, atol=1e-4)

    unet = load_unet(random_filled, torch.float32)
    names = load_adapter({UNET: unet}, path)[UNET]
    require_complete({UNET: unet}, path)
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-4)
    assert names == adapted_module_names(trained)
    with without_adapter(unet):
        assert torch.equal(output(unet), plain)
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_add_adapter_starts_unchanged_and_trains_only_the_adapter(
    random_filled: ResolvedModel, plain: torch.Tensor, kind: str
):
    unet = load_unet(random_filled, torch.float32)
    state = torch.get_rng_state()
    parameters = add_adapter(unet, settings_of(kind), seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is unchanged"
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    # weights rebuilt from W + update - W differ in the last bits; norms are divided by themselves
    torch.testing.assert_close(output(unet), plain, rtol=0, atol=5e-6)
    base = {name: p.clone() for name, p in unet.named_parameters() if not p.requires_grad}
    train(unet, steps=2)
    assert all(torch.equal(base[name], p) for name, p in unet.named_parameters() if name in base)
    assert {adapter_kind(unet)} <= {"lora", "dora", "lycoris"}


@pytest.mark.parametrize("kind", ["dora", "lokr, whole matrices", "loha"])
def test_initial_adapter_depends_only_on_the_seed(random_filled: ResolvedModel, kind: str):
    def start(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + 100)
        return add_adapter(load_unet(random_filled, torch.float32), settings_of(kind), seed)

    one, again, other = start(1), start(1), start(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_adapter_scale_is_alpha_over_rank(random_filled: ResolvedModel):
    """Compute one layer by hand: W x + alpha / rank times B A x, and for a LoKr kron(w1, w2) x."""
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(0))
    name = "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    plain = load_unet(random_filled, torch.float32).get_submodule(name)

    unet = shared_unet(random_filled, "lora, alpha above rank")
    layer = unet.get_submodule(name)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(layer(x), plain(x) + 10 / 4 * (x @ low.T @ high.T))

    unet = shared_unet(random_filled, "lokr")
    (lora,) = [lora for lora in unet.lycoris.loras if lora.org_module[0] is unet.get_submodule(name)]
    update = 1 / 4 * torch.kron(lora.lokr_w1, lora.lokr_w2_a @ lora.lokr_w2_b)
    torch.testing.assert_close(unet.get_submodule(name)(x), plain(x) + x @ update.T)


def test_init_lokr_norm_initializes_with_noise_of_the_weights_scale(random_filled: ResolvedModel):
    unet = load_unet(random_filled, torch.float32)
    add_adapter(unet, settings_of("lokr, whole matrices", init_lokr_norm=1e-3), seed=0)
    for lora in unet.lycoris.loras:
        weight = lora.org_weight
        assert torch.equal(lora.lokr_w1, torch.ones_like(lora.lokr_w1))
        assert lora.lokr_w2.std().item() == pytest.approx(1e-3 * weight.std().item(), rel=1e-4)
        assert lora.lokr_w2.mean().item() == pytest.approx(1e-3 * weight.mean().item(), abs=1e-8)
    with pytest.raises(
        AdapterError, match=r"init_lokr_norm needs a LoKr of full matrices: set full_matrix to true"
    ):
        add_adapter(load_unet(random_filled, torch.float32), settings_of("lokr", init_lokr_norm=1e-3), seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lycoris("lokr", apply_preset={"target_module": ["Atention"]}), "of the class Atention. Some that it has: Att"),
        (lycoris("lokr", apply_preset={"target_name": ["to_qkv"]}), "'to_qkv' matches no layer name of the model"),
        (lycoris("lokr", apply_preset={**ATTENTION, "exclude_name": ["to_qkv"]}), "'to_qkv' matches no layer name"),
        (lycoris("lokr", apply_preset={"target_module": ["GroupNorm"]}), "targets no linear layer"),
        ({"lora_target_modules": ["to_qkv"]}, "ends in 'to_qkv'"),
        ({"lora_target_modules": ["norm1"]}, "lora_target_modules: .*not supported"),
    ],
)  # fmt: skip
def test_add_adapter_with_unmatched_targets_raises(random_filled: ResolvedModel, config: dict, message: str):
    with pytest.raises(AdapterError, match=message):
        add_adapter(load_unet(random_filled, torch.float32), TrainingSettings.model_validate(config), seed=0)


def test_add_adapter_with_a_factorization_that_cannot_load_back_raises(
    random_filled: ResolvedModel, monkeypatch
):
    from lycoris.modules.lokr import LokrModule

    def half(cls, name, module, *parts):  # a wrong guess of the factorization
        return cls(name, module, 1, 2, 1.0)

    monkeypatch.setattr(LokrModule, "make_module_from_state_dict", classmethod(half))
    with pytest.raises(AdapterError, match=r"could not load back .* Set another factor"):
        add_adapter(load_unet(random_filled, torch.float32), settings_of("lokr"), seed=0)


def test_dora_on_bf16_convolutions_raises(random_filled: ResolvedModel):
    with pytest.raises(AdapterError, match=r"norms of convolutions.*bfloat16.*mixed_precision to no"):
        add_adapter(load_unet(random_filled, torch.bfloat16), settings_of("dora, convolutions"), seed=0)


def test_dora_in_bf16_starts_as_the_base_model(random_filled: ResolvedModel):
    unet = load_unet(random_filled, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        before = output(unet, torch.bfloat16)
    add_adapter(unet, settings_of("dora"), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output(unet, torch.bfloat16), before)


def test_quantized_lycoris_uses_bypass_and_peft_convolutions_raise(random_filled: ResolvedModel):
    pytest.importorskip("optimum.quanto")
    unet = load_unet(random_filled, torch.float32)
    quantize_model(unet, "int8-quanto")
    before = output(unet)
    add_adapter(unet, settings_of("lokr, convolutions", base_model_precision="int8-quanto"), seed=0)
    assert torch.equal(output(unet), before)
    train(unet, steps=1)
    assert all(lora.bypass_mode for lora in unet.lycoris.loras)
    other = load_unet(random_filled, torch.float32)
    quantize_model(other, "int8-quanto")
    with pytest.raises(AdapterError, match="is a quantized convolution"):
        add_adapter(other, settings_of("lora, gaussian, convolutions"), seed=0)


@pytest.mark.parametrize("precision", DORA_PRECISIONS)
def test_dora_on_quantized_weights_equals_dora_on_dequantized_ones(precision: str):
    """PEFT must dequantize the weights of every precision: one layer, compared with the dequantized weights."""
    torch.manual_seed(0)
    full = torch.nn.Sequential(torch.nn.Linear(128, 256)).requires_grad_(False)
    quantized = deepcopy(full)
    quantize_model(quantized, precision)
    eye = torch.eye(128)
    with torch.no_grad():
        full[0].weight.copy_((quantized(eye) - quantized[0].bias).T)
    x = torch.randn(8, 128)
    outputs = []
    for model in (full, quantized):
        before = model(x)
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True), model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-4)
        optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-2)
        for _ in range(3):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        outputs.append(model(x).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)


def test_save_adapter_is_deterministic(random_filled: ResolvedModel, tmp_path: Path):
    digests = set()
    for number in range(2):
        path = tmp_path / f"{number}.safetensors"
        save_adapter(
            {UNET: adapted_unet(random_filled, settings_of("lokr"), steps=1)},
            path,
            {str(n): "x" for n in range(9)},
        )
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1
