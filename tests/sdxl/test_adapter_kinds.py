"""Holds, for every kind of adapter: the start changes nothing and depends on the seed alone, the file loads back through its users'
own loader as the model that was trained, and what cannot be had is refused with the reason.
"""

from pathlib import Path

import pytest
import torch

from sdxl_pipeline.sdxl.adapters import (
    UNET,
    adapted_module_names,
    adapter_kind,
    add_adapter,
    load_adapter,
    require_whole,
    save_adapter,
    without_adapter,
)
from sdxl_pipeline.sdxl.base_model import ResolvedModel
from sdxl_pipeline.sdxl.components import load_pipeline, load_unet
from tests.sdxl.adapted_unets import KINDS, adapted_unet, output, settings_of, train

LYCORIS = [kind for kind, settings in KINDS.items() if "lycoris_config" in settings]
PEFT = [kind for kind in KINDS if kind not in LYCORIS]


@pytest.fixture(scope="module")
def plain(lively: ResolvedModel) -> torch.Tensor:
    return output(load_unet(lively, torch.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_loads_through_its_users_loader_as_the_model_that_was_trained(
    lively: ResolvedModel, plain: torch.Tensor, tmp_path: Path, kind: str
):
    trained = adapted_unet(lively, settings_of(kind))
    expected = output(trained)
    assert (expected - plain).abs().max() > 1e-2
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_adapter({UNET: trained}, path, {"note": "anything"})

    pipeline = load_pipeline(lively, torch.float32)
    if kind in LYCORIS:  # as the model card says
        from lycoris import create_lycoris_from_weights

        network, _ = create_lycoris_from_weights(1.0, str(path), pipeline.unet)
        network.apply_to()
    else:
        pipeline.load_lora_weights(str(tmp_path))
    torch.testing.assert_close(output(pipeline.unet), expected, rtol=0, atol=1e-4)

    unet = load_unet(lively, torch.float32)
    names = load_adapter({UNET: unet}, path)[UNET]
    require_whole({UNET: unet}, path)
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-4)
    assert names == adapted_module_names(trained)
    with without_adapter(unet):
        assert torch.equal(output(unet), plain)
    torch.testing.assert_close(output(unet), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_starts_unchanged_and_only_the_adapter_trains(
    lively: ResolvedModel, plain: torch.Tensor, kind: str
):
    unet = load_unet(lively, torch.float32)
    state = torch.get_rng_state()
    parameters = add_adapter(unet, settings_of(kind), seed=0)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    # weights rebuilt from W + update - W round in the last bits; norms are divided by themselves
    torch.testing.assert_close(output(unet), plain, rtol=0, atol=5e-6)
    base = {name: p.clone() for name, p in unet.named_parameters() if not p.requires_grad}
    train(unet, steps=2)
    assert all(torch.equal(base[name], p) for name, p in unet.named_parameters() if name in base)
    assert {adapter_kind(unet)} <= {"lora", "dora", "lycoris"}
