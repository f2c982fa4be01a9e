"""The eval loss: the training objective on fixed images, timesteps and noise, so that only the weights can change it.

A training loss is sampled anew at every step and hardly comparable between checkpoints. Here nothing is random: latents are posterior
means, the caption is the first one, there is no dropout, and the noise is a pure function of (image, timestep). `eval_samples` selects
the images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.evaluation_report import LossSummary
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.samples import Sample
from sdxl_pipeline.training.diffusion.objective import Objective
from sdxl_pipeline.training.rng import derive_seed


@dataclass(frozen=True)
class EvalImage:
    """The UNet's inputs for one image of the eval loss. On the CPU, float32."""

    key: str  # digest of the image's bytes: the seed of its noise
    entry_keys: tuple[str, ...]  # store keys of its latents and its caption
    latents: Tensor  # (4, H/8, W/8), scaled as the UNet expects
    prompt_embeds: Tensor  # (77, C1 + C2)
    pooled_prompt_embeds: Tensor  # (C2,)
    time_ids: tuple[int, int, int, int, int, int]


def load_eval_images(
    samples: Iterable[Sample], reader: BatchReader, scaling_factor: float
) -> list[EvalImage]:
    """Read the samples, with the posterior mean as latents and the first caption as prompt."""
    images = []
    for sample in samples:
        posteriors = reader.posteriors([sample])
        texts = reader.text_embeds([sample], [sample.embed_keys[0]])
        images.append(
            EvalImage(
                key=sample.key,
                entry_keys=(str(sample.latent_key), sample.embed_keys[0]),
                latents=posteriors.mean[0] * scaling_factor,
                prompt_embeds=texts.prompt_embeds[0].float(),
                pooled_prompt_embeds=texts.pooled_prompt_embeds[0].float(),
                time_ids=sample.time_ids,
            )
        )
    return images


def eval_timesteps(count: int, num_train_timesteps: int = 1000) -> tuple[int, ...]:
    """Return the midpoints of `count` equal parts of the schedule: their mean loss is a midpoint-rule estimate over the full schedule."""
    return tuple((2 * part + 1) * num_train_timesteps // (2 * count) for part in range(count))


def fixed_noise(key: str, timestep: int, shape: torch.Size) -> Tensor:
    """Return the noise of one image at one timestep, float32, generated on the CPU so that it is the same for every device."""
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
    """Return the mean squared error of the UNet's prediction by timestep, over all images with equal weight.

    Unweighted, whatever weighting the training uses. Runs on the UNet's device and in its dtype; the error is computed in float32.
    `on_batch` is called with (pairs done, total pairs) of (image, timestep) after each forward pass. Leaves the UNet in eval mode.
    """
    unet.eval()
    pairs = [(row, column) for row in range(len(images)) for column in range(len(timesteps))]
    losses = torch.empty(len(images), len(timesteps), dtype=torch.float64)
    done = 0
    for batch in _batches(pairs, images, batch_size):
        errors = _mean_squared_errors(unet, objective, [(images[row], timesteps[col]) for row, col in batch])
        for (row, column), error in zip(batch, errors.tolist(), strict=True):
            losses[row, column] = error
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
    images: Sequence[EvalImage], losses: Sequence[float], measurement: Sequence[int | str]
) -> tuple[tuple[str, float], ...]:
    """Return (name, loss) of each distinct image, its copies averaged. The name is a digest of all that the loss depends on but the model."""
    copies: dict[str, list[tuple[list[object], float]]] = {}
    for image, loss in zip(images, losses, strict=True):
        copies.setdefault(image.key, []).append(([*image.entry_keys, *image.time_ids], loss))
    by_image = []
    for key, of_key in copies.items():
        inputs = sorted((inputs for inputs, _ in of_key), key=str)
        mean = sum(loss for _, loss in of_key) / len(of_key)
        by_image.append((digest_json([key, list(measurement), inputs])[:16], mean))
    return tuple(by_image)


def _batches(
    pairs: Sequence[tuple[int, int]], images: Sequence[EvalImage], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """Yield batches of (row, column) pairs; the latents of a batch have one size, so that they stack."""
    by_size: dict[torch.Size, list[tuple[int, int]]] = {}
    for pair in pairs:
        by_size.setdefault(images[pair[0]].latents.shape, []).append(pair)
    for same_size in by_size.values():
        for start in range(0, len(same_size), batch_size):
            yield same_size[start : start + batch_size]


def _mean_squared_errors(
    unet: UNet2DConditionModel, objective: Objective, batch: Sequence[tuple[EvalImage, int]]
) -> Tensor:
    """Return the mean squared error of each (image, timestep): (B,) float32."""
    images = [image for image, _ in batch]
    latents = torch.stack([image.latents for image in images])  # (B, 4, H/8, W/8)
    noise = torch.stack([fixed_noise(image.key, timestep, image.latents.shape) for image, timestep in batch])
    timesteps = torch.tensor([timestep for _, timestep in batch])  # (B,)
    noisy_latents = objective.add_noise(latents, noise, timesteps)
    like_unet = {"device": unet.device, "dtype": unet.dtype}
    prediction = unet(
        noisy_latents.to(**like_unet),
        timesteps.to(unet.device),
        encoder_hidden_states=torch.stack([image.prompt_embeds for image in images]).to(
            **like_unet
        ),  # (B, 77, C1 + C2)
        added_cond_kwargs={
            "text_embeds": torch.stack([image.pooled_prompt_embeds for image in images]).to(
                **like_unet
            ),  # (B, C2)
            # float32, because bf16 has 8 bits of precision and would round a height of 1820 to 1824
            "time_ids": torch.tensor(
                [image.time_ids for image in images], dtype=torch.float32, device=unet.device
            ),
        },
    ).sample
    target = objective.unet_target(latents, noise, timesteps)
    return (prediction.float().cpu() - target).square().mean(dim=(1, 2, 3))
