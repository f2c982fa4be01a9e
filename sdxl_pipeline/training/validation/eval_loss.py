"""The stable eval loss: the training objective on fixed images, timesteps and noise, so that only the weights can change it.

A training loss is drawn anew at every step and says little about one checkpoint. Here nothing is drawn: the latents are the posterior
means, the caption is the first one, nothing is dropped, and the noise is a pure function of (image, timestep).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.specs import LossSummary
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.rng import derive_seed


@dataclass(frozen=True)
class EvalImage:
    """One image of the eval loss, as the UNet takes it. On the CPU, float32."""

    key: str  # digest of the image's bytes: seeds its noise
    measured: tuple[str, ...]  # names its latents and its caption
    latents: Tensor  # (4, H/8, W/8), scaled as the UNet expects
    prompt_embeds: Tensor  # (77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (C2,)
    time_ids: tuple[int, int, int, int, int, int]


def eval_timesteps(count: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """The middles of `count` equal parts of the schedule, which makes their mean loss an unbiased image of the whole schedule."""
    return tuple((2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count))


def fixed_noise(key: str, timestep: int, shape: torch.Size) -> Tensor:
    """The noise of one image at one timestep: float32, drawn on the CPU, so it is the same on every device."""
    generator = torch.Generator("cpu").manual_seed(derive_seed("eval-noise", key, timestep))
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def eval_loss(
    unet: UNet2DConditionModel,
    objective: Objective,
    images: Sequence[EvalImage],
    timesteps: Sequence[int],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> LossSummary:
    """Mean squared error of the UNet's prediction by timestep, over all images with equal weight.

    Unweighted, whatever weighting the training used. Runs on the UNet's device and in its dtype; the error is taken in float32.
    `on_batch` gets (pairs done, pairs in all) after each forward pass.
    """
    unet.eval()
    pairs = [(image, column) for image in range(len(images)) for column in range(len(timesteps))]
    losses = torch.empty(len(images), len(timesteps), dtype=torch.float64)
    done = 0
    for batch in _batches(pairs, images, batch_size):
        errors = _errors(unet, objective, [(images[p], timesteps[c]) for p, c in batch])
        for (image, column), error in zip(batch, errors.tolist(), strict=True):
            losses[image, column] = error
        done += len(batch)
        if on_batch is not None:
            on_batch(done, len(pairs))
    by_timestep = losses.mean(dim=0)
    return LossSummary(
        mean=by_timestep.mean().item(),
        by_timestep=tuple(zip(timesteps, by_timestep.tolist(), strict=True)),
        by_image=_by_image(images, losses.mean(dim=1).tolist(), [*timesteps, objective.prediction_type]),
    )


def _by_image(
    images: Sequence[EvalImage], losses: Sequence[float], measured: Sequence[int | str]
) -> tuple[tuple[str, float], ...]:
    """Return the loss of each content, its copies averaged, under a name for all that it depends on but the model."""
    copies: dict[str, list[tuple[list[object], float]]] = {}
    for image, loss in zip(images, losses, strict=True):
        copies.setdefault(image.key, []).append(([*image.measured, *image.time_ids], loss))
    found = []
    for key, of_key in copies.items():
        names = sorted((name for name, _ in of_key), key=str)
        mean = sum(loss for _, loss in of_key) / len(of_key)
        found.append((digest_json([key, list(measured), names])[:16], mean))
    return tuple(found)


def _batches(
    pairs: Sequence[tuple[int, int]], images: Sequence[EvalImage], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Pairs of one latent size each, so that they stack."""
    by_size: dict[torch.Size, list[tuple[int, int]]] = {}
    for pair in pairs:
        by_size.setdefault(images[pair[0]].latents.shape, []).append(pair)
    for same_size in by_size.values():
        for start in range(0, len(same_size), batch_size):
            yield same_size[start : start + batch_size]


def _errors(
    unet: UNet2DConditionModel, objective: Objective, batch: Sequence[tuple[EvalImage, int]]
) -> Tensor:
    """Mean squared error of each (image, timestep): (B,) float32."""
    images = [image for image, _ in batch]
    latents = torch.stack([image.latents for image in images])  # (B, 4, H/8, W/8)
    noise = torch.stack([fixed_noise(p.key, timestep, p.latents.shape) for p, timestep in batch])
    timesteps = torch.tensor([timestep for _, timestep in batch])  # (B,)
    noisy_latents = objective.add_noise(latents, noise, timesteps)
    place = {"device": unet.device, "dtype": unet.dtype}
    prediction = unet(
        noisy_latents.to(**place),
        timesteps.to(unet.device),
        encoder_hidden_states=torch.stack([p.prompt_embeds for p in images]).to(**place),  # (B, 77, C1 + C2)
        added_cond_kwargs={
            "text_embeds": torch.stack([p.pooled_prompt_embeds for p in images]).to(**place),  # (B, C2)
            # In float32: bf16 holds 8 bits, which would turn a height of 1820 into 1824.
            "time_ids": torch.tensor([p.time_ids for p in images], dtype=torch.float32, device=unet.device),
        },
    ).sample
    target = objective.prediction_target(latents, noise, timesteps)
    return (prediction.float().cpu() - target).square().mean(dim=(1, 2, 3))
