"""Holds that recomputed activations give the same gradients, to the bit, and that an interval recomputes every n-th layer."""

import pytest
import torch

from sdxl_pipeline.models.adapters.adapter import add_lora
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.gradient_checkpointing import LAYERS, enable_checkpointing
from tests.models.test_precision import predict


def gradients_and_runs(model: ResolvedModel, interval: int | None) -> tuple[list[torch.Tensor], list[int]]:
    """The adapter's gradients, and how often each layer was run. `interval` None: nothing is recomputed."""
    unet = load_unet(model, torch.float32).train()
    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "to_v"], seed=0)
    unet.conv_in.requires_grad_(
        True
    )  # else what lies before the first adapter has no gradient to recompute for
    layers = [module for module in unet.modules() if isinstance(module, LAYERS)]
    runs = [0] * len(layers)
    for place, layer in enumerate(layers):

        def count(*_, place=place):
            runs[place] += 1

        layer.register_forward_pre_hook(count)
    if interval is not None:
        enable_checkpointing(unet, interval)
    predict(unet).square().mean().backward()
    return [parameter.grad for parameter in parameters], runs


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_every_nth_layer_is_run_twice_and_the_gradients_are_the_same(lively: ResolvedModel, interval):
    expected, once = gradients_and_runs(lively, None)
    assert set(once) == {1}
    found, runs = gradients_and_runs(lively, interval)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found)
    expected_runs = [2 if place % interval == 0 else 1 for place in range(len(runs))]
    unet = load_unet(lively, torch.float32)
    layers = [module for module in unet.modules() if isinstance(module, LAYERS)]
    expected_runs[layers.index(unet.mid_block.resnets[0])] = 1  # diffusers runs it as it stands
    assert runs == expected_runs
