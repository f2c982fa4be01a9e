"""The training loss of one batch: noisy latents, prediction, target and loss."""

from functools import partial

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.training.data.batches import ALL, Batch
from sdxl_pipeline.training.diffusion.objective import build_objective
from sdxl_pipeline.training.diffusion.prior_preservation import prior_preservation_target
from sdxl_pipeline.training.diffusion.scheduled_sampling import Predict, build_solver, roll_out
from sdxl_pipeline.training.trainable import Trainable


class BatchLoss:
    """The training loss of a batch, computed on `device`; the UNet computes in `dtype`."""

    def __init__(
        self,
        settings: TrainingSettings,
        scheduler: DDPMScheduler,
        trainable: Trainable,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.objective = build_objective(settings, scheduler).to(device)
        self._solver = build_solver(settings, scheduler)
        self._trainable, self._dtype = trainable, dtype

    def __call__(self, module: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch on the device, (). `module` is that of `trainable`, or its data-parallel wrapper."""
        objective, timesteps = self.objective, batch.timesteps
        # without gradients no synchronization is needed, so the unwrapped module is called
        predict_no_grad = partial(self._predict, self._trainable.module, batch)
        noisy_latents = objective.add_noise(batch.latents, batch.input_noise, timesteps)
        if batch.rollouts:
            noisy_latents = self._roll_out(batch, noisy_latents, predict_no_grad)
        target = objective.target(batch.latents, batch.noise, timesteps)
        if any(batch.prior):
            target = prior_preservation_target(
                target,
                batch,
                noisy_latents,
                objective,
                self._trainable.unet,
                predict_no_grad,
                self._trainable.encoders,
            )
        prediction = self._predict(module, batch, noisy_latents, timesteps)
        loss = objective.elementwise_loss(
            objective.to_loss_space(prediction, noisy_latents, timesteps), target, timesteps
        )
        if batch.loss_weights is not None:
            loss = loss * batch.loss_weights
        return objective.per_sample_loss(loss, timesteps).mean()

    def _predict(
        self,
        module: nn.Module,
        batch: Batch,
        noisy_latents: Tensor,
        timesteps: Tensor,
        items: Tensor | slice = ALL,
    ) -> Tensor:
        """Return the UNet's output for `noisy_latents` at `timesteps`, for these items of the batch."""
        prediction: Tensor = module(
            noisy_latents.to(self._dtype),
            timesteps,
            **batch.conditioning(self._dtype, items),
            return_dict=False,
        )[0]
        return prediction

    def _roll_out(self, batch: Batch, noisy_latents: Tensor, predict: Predict) -> Tensor:
        """Return `noisy_latents` with the batch's rollouts, computed in eval mode (without dropout) as in inference."""
        self._trainable.module.eval()
        try:
            return roll_out(
                noisy_latents, batch.latents, batch.input_noise, batch.rollouts, self._solver, predict
            )
        finally:
            self._trainable.module.train()
