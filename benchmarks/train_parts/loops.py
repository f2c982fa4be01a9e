"""The two reference loops of the benchmarks: a bare one, and that of diffusers' example script for LoRAs of SDXL.

This module imports only torch, accelerate, diffusers and transformers, so that a machine with only those can run it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 2.0


class Tensors(NamedTuple):
    """One batch on the device."""

    latents: Tensor  # (B, 4, H/8, W/8) float32, scaled
    noise: Tensor  # (B, 4, H/8, W/8) float32
    timesteps: Tensor  # (B,) int64
    prompt_embeds: Tensor  # (B, 77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (B, C2)
    time_ids: Tensor  # (B, 6) float32


class BareLoop:
    """The arithmetic of a training step only: noising, UNet, loss, backward, clipping, AdamW; batches in memory."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        parameters: Sequence[Parameter],
        alphas_cumprod: Tensor,
        batches: Sequence[Tensors],
        precision: torch.dtype,
    ) -> None:
        self.unet, self.parameters, self.precision = unet, list(parameters), precision
        self.device = next(unet.parameters()).device
        self.alphas_cumprod = alphas_cumprod.to(self.device)
        self.optimizer = AdamW(
            self.parameters,
            lr=LEARNING_RATE,
            betas=(0.9, 0.999),
            weight_decay=0.01,
            eps=1e-8,
            fused=self.device.type != "meta",
        )
        self.batches = cycle(batches)
        unet.train()

    def take(self, steps: int) -> None:
        """Take steps; a GPU may still be computing them on return."""
        for _ in range(steps):
            self.loss(next(self.batches)).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def loss(self, batch: Tensors) -> Tensor:
        """Return the mean squared error of the predicted noise, ()."""
        alphas_cumprod = self.alphas_cumprod[batch.timesteps][:, None, None, None]
        noisy = alphas_cumprod.sqrt() * batch.latents + (1 - alphas_cumprod).sqrt() * batch.noise
        autocast = (
            nullcontext()
            if self.precision == torch.float32
            else torch.autocast(self.device.type, self.precision)
        )
        with autocast:
            prediction = self.unet(
                noisy.to(self.precision),
                batch.timesteps,
                encoder_hidden_states=batch.prompt_embeds.to(self.precision),
                added_cond_kwargs={
                    "text_embeds": batch.pooled_prompt_embeds.to(self.precision),
                    "time_ids": batch.time_ids,
                },
                return_dict=False,
            )[0]
        return (prediction.float() - batch.noise).square().mean()


class ExampleModels(NamedTuple):
    """What diffusers' example keeps on the device throughout: everything."""

    unet: UNet2DConditionModel  # with its LoRA
    vae: AutoencoderKL
    tokenizers: tuple[Any, Any]
    text_encoders: tuple[Any, Any]
    scheduler: DDPMScheduler


class ExampleLoop:
    """The structure of diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py, for a UNet's LoRA with its default options.

    Per step: the batch's images through the VAE, its captions through both tokenizers and text encoders, the UNet, a loss gathered
    over the processes and fetched from the device, and fetched again for the progress bar.
    """

    def __init__(
        self,
        models: ExampleModels,
        loader: Iterator[tuple[Tensor, list[str]]],
        accelerator: Accelerator,
        precision: torch.dtype,
    ) -> None:
        self.models, self.loader, self.accelerator, self.precision = models, loader, accelerator, precision
        self.parameters = [parameter for parameter in models.unet.parameters() if parameter.requires_grad]
        optimizer = AdamW(self.parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8)
        schedule = get_scheduler("constant", optimizer=optimizer)
        self.unet, self.optimizer, self.schedule = accelerator.prepare(models.unet, optimizer, schedule)
        self.train_loss = 0.0
        self.unet.train()

    def take(self, steps: int) -> None:
        """Take steps; each of them waits for the device."""
        for _ in range(steps):
            with self.accelerator.accumulate(self.unet):
                pixels, captions = next(self.loader)
                loss = self._loss(pixels, captions)
                gathered = self.accelerator.gather(loss.repeat(len(captions))).mean()
                self.train_loss = gathered.item()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            self._show({"step_loss": loss.detach().item(), "lr": self.schedule.get_last_lr()[0]})

    def _loss(self, pixels: Tensor, captions: list[str]) -> Tensor:
        models, device = self.models, self.accelerator.device
        with torch.no_grad():
            latents = models.vae.encode(pixels.to(device, models.vae.dtype)).latent_dist.sample()
            latents = (latents * models.vae.config.scaling_factor).to(self.precision)
        noise = torch.randn_like(latents)
        steps = models.scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (len(captions),), device=device).long()
        noisy = models.scheduler.add_noise(latents, noise, timesteps).to(self.precision)
        height, width = pixels.shape[-2:]
        time_ids = torch.cat(
            [
                torch.tensor([[height, width, 0, 0, height, width]], device=device, dtype=self.precision)
                for _ in captions
            ]
        )
        prompt_embeds, pooled = self._encode(captions)
        prediction = self.unet(
            noisy,
            timesteps,
            prompt_embeds,
            added_cond_kwargs={"time_ids": time_ids, "text_embeds": pooled},
            return_dict=False,
        )[0]
        return F.mse_loss(prediction.float(), noise.float(), reduction="mean")

    @torch.no_grad()
    def _encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        hidden = []
        for tokenizer, encoder in zip(self.models.tokenizers, self.models.text_encoders, strict=True):
            ids = tokenizer(
                captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            output = encoder(ids.to(self.accelerator.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
        return torch.cat(hidden, dim=-1), output[0].view(len(captions), -1)

    def _show(self, values: dict[str, float]) -> None:
        """Check the values that the example shows in its progress bar."""
        if not math.isfinite(values["step_loss"]):
            raise RuntimeError(f"the example's loop diverged: {values}")


def synchronized(take: Callable[[int], None], device: torch.device) -> Callable[[int], None]:
    """Return `take` with a wait for the device at its end."""

    def finished(steps: int) -> None:
        take(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return finished
