"""Gradient checkpointing: bit-identical gradients, and an interval that recomputes every n-th layer."""

import pytest
import torch

from sdxl_pipeline.models.adapters.adapter import add_lora
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.components import load_unet
from sdxl_pipeline.models.unet_execution import CHECKPOINTED_LAYERS, enable_checkpointing
from tests.models.test_precision import predict


def gradients_and_runs(model: ResolvedModel, interval: int | None) -> tuple[list[torch.Tensor], list[int]]:
    """Return the adapter's gradients, and how often each layer was run. `interval` None: nothing is recomputed."""
    unet = load_unet(model, torch.float32).train()
    parameters = add_lora(unet, 2, 2.0, 0.0, ["to_q", "to_v"], seed=0)
    unet.conv_in.requires_grad_(
        True
    )  # else layers before the first adapter have no gradient to recompute for
    layers = [module for module in unet.modules() if isinstance(module, CHECKPOINTED_LAYERS)]
    runs = [0] * len(layers)
    for position, layer in enumerate(layers):

        def count(*_, position=position):
            runs[position] += 1

        layer.register_forward_pre_hook(count)
    if interval is not None:
        enable_checkpointing(unet, interval)
    predict(unet).square().mean().backward()
    return [parameter.grad for parameter in parameters], runs


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_enable_checkpointing_recomputes_every_nth_layer_with_equal_gradients(
    random_filled: ResolvedModel, interval
):
    expected, once = gradients_and_runs(random_filled, None)
    assert set(once) == {1}
    found, runs = gradients_and_runs(random_filled, interval)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in found)
    expected_runs = [2 if position % interval == 0 else 1 for position in range(len(runs))]
    unet = load_unet(random_filled, torch.float32)
    layers = [module for module in unet.modules() if isinstance(module, CHECKPOINTED_LAYERS)]
    expected_runs[layers.index(unet.mid_block.resnets[0])] = 1  # diffusers never checkpoints it
    assert runs == expected_runs
