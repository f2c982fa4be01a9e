"""Prior preservation: images of which the adapter is to change nothing, trained towards what the base model predicts of them.

In DreamBooth (Ruiz et al. 2023) such images are drawn by the base model and trained on as they are. Here any images will do: their
target is the prediction of the model without its adapter, for the same x_t and caption, so that the loss is zero before the first
step, and whatever the adapter changes of them is undone. Where the UNet itself is trained there is no base model left to ask, and the
images' own targets stay.
"""

from collections.abc import Iterable

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from sdxl_pipeline.models.adapters.adapter import without_adapter
from sdxl_pipeline.training.data.batches import Batch
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.diffusion.scheduled_sampling import Predict


@torch.no_grad()
def prior_preservation_target(
    wanted: Tensor,
    batch: Batch,
    noisy_latents: Tensor,
    objective: Objective,
    unet: UNet2DConditionModel,
    predict: Predict,
    encoders: Iterable[nn.Module] = (),
) -> Tensor:
    """`wanted` (B, C, H, W), what the objective wants of each image; of those that are `prior`, what `unet` gives without its adapter.

    `predict` is how `unet` is asked about items of the batch, which are only those that are `prior`. `encoders` are text encoders with an
    adapter of their own.
    """
    prior = [item for item, is_prior in enumerate(batch.prior) if is_prior]
    if not prior:
        return wanted
    items = torch.tensor(prior, device=noisy_latents.device)
    noisy, timesteps = noisy_latents[items], batch.timesteps[items]
    with without_adapter(unet, *encoders):
        prediction = predict(noisy, timesteps, items)
    return wanted.index_copy(0, items, objective.to_loss_space(prediction, noisy, timesteps))
