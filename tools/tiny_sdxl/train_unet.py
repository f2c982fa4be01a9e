"""Training of the UNet on cached latents: epsilon prediction, min-SNR weights, two data-parallel processes."""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, DDPMScheduler
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from tools.tiny_sdxl.architecture import NOISE_SCHEDULE, build_unet
from tools.tiny_sdxl.budget import Budget, set_learning_rate
from tools.tiny_sdxl.shape_batches import BUCKET_SHARES, build_training_set
from tools.tiny_sdxl.unet_state import UNetState

_LOGGER = logging.getLogger(__name__)
_IMAGES = 32_000
_GLOBAL_BATCH = 80
_PEAK_RATE = 1.2e-3
_MIN_SNR_GAMMA = 5.0
# One caption in ten is dropped: to SDXL base's zeros, or to the encoded empty prompt that fine-tuning uses.
_DROP, _DROP_TO_EMPTY = 0.10, 0.04
_AVERAGE_DECAY = 0.999
_SAVE_EVERY = 250


class TextEmbedder:
    """Captions encoded as the UNet's conditioning: penultimate states of both encoders, pooled output of the second."""

    def __init__(self, parts: Path) -> None:
        self._tokenizers = [
            CLIPTokenizerFast.from_pretrained(parts / name) for name in ("tokenizer", "tokenizer_2")
        ]
        self._first = CLIPTextModel.from_pretrained(parts / "text_encoder").eval()
        self._second = CLIPTextModelWithProjection.from_pretrained(parts / "text_encoder_2").eval()
        self._known: list[dict[str, list[int]]] = [{}, {}]

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return prompt_embeds (B, 77, 128) and pooled_prompt_embeds (B, 64)."""
        with torch.autocast("cpu", torch.bfloat16):
            first = self._first(self._ids(0, captions), output_hidden_states=True)
            second = self._second(self._ids(1, captions), output_hidden_states=True)
        hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return hidden.float(), second.text_embeds.float()

    def _ids(self, which: int, captions: Sequence[str]) -> Tensor:
        known = self._known[which]
        for caption in captions:
            if caption not in known:
                known[caption] = self._tokenizers[which](
                    caption, padding="max_length", truncation=True, max_length=77
                ).input_ids
        return torch.tensor([known[caption] for caption in captions])


def train_unet(
    parts: Path, budget_seconds: float, max_steps: int, rank: int, world_size: int, seed: int = 0
) -> tuple[int, float]:
    """Run one data-parallel process of the training; rank 0 saves the averaged weights to `parts`/unet.

    Return the steps and the seconds, including those of an interrupted training that it resumes: every
    250 steps rank 0 saves its state to unet-checkpoint.safetensors, and a training that finds this file resumes
    from it, with new random numbers and a new budget. The processes connect through MASTER_ADDR and
    MASTER_PORT.
    """
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    torch.manual_seed(seed)
    unet = build_unet()
    unet.set_attn_processor(
        AttnProcessor()
    )  # plain matrix products: on CPUs faster than the fused kernel's backward
    state = UNetState(unet, _PEAK_RATE, _AVERAGE_DECAY)
    checkpoint = parts / "unet-checkpoint.safetensors"
    if checkpoint.exists():
        state.load(checkpoint)
    spent_before = state.seconds

    vae = AutoencoderKL.from_pretrained(parts / "vae").eval()
    embed = TextEmbedder(parts)
    buckets = build_training_set(vae, _IMAGES // world_size, seed + 1000 * (rank + 1))
    rng, bucket_rng = random.Random(seed + 100 + rank + state.step), random.Random(seed + 5 + state.step)
    torch.manual_seed(seed + 100 + rank + state.step)
    alphas = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod
    density = _timestep_density(alphas)
    budget = Budget(budget_seconds, max_steps)
    size = _GLOBAL_BATCH // world_size
    recent: list[float] = []
    while (spent := _agree(budget.spent(state.step), world_size)) < 1:
        rate = set_learning_rate(state.optimizer, _PEAK_RATE, state.step, spent, warmup_steps=150, hold=0.3)
        batch = bucket_rng.choices(buckets, BUCKET_SHARES)[0].sample(size, rng)
        prompt_embeds, pooled = _drop_captions(embed, batch.captions, rng)
        timesteps = _stratified_timesteps(size, density)
        noise = torch.randn_like(batch.latents)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * batch.latents + (1 - alpha).sqrt() * noise
        conditions = {"text_embeds": pooled, "time_ids": batch.time_ids}
        with torch.autocast("cpu", torch.bfloat16):
            predicted = unet(noisy, timesteps, prompt_embeds, added_cond_kwargs=conditions).sample
        loss = (predicted.float() - noise).pow(2).mean()
        state.optimizer.zero_grad()
        loss.backward()
        _average_gradients(state.parameters, world_size)
        state.update()
        state.seconds = spent_before + budget.elapsed()
        recent = [*recent[-49:], loss.item()]
        if rank == 0 and state.step % 50 == 0:
            mean = sum(recent) / len(recent)
            _LOGGER.info(f"unet step {state.step} seconds {state.seconds:.0f} mse {mean:.4f} rate {rate:.5f}")
        if rank == 0 and state.step % _SAVE_EVERY == 0:
            state.save(checkpoint)
            state.save_average(parts / "unet")
    if rank == 0:
        state.save_average(parts / "unet")
        checkpoint.unlink(missing_ok=True)
    if world_size > 1:
        dist.destroy_process_group()
    return state.step, state.seconds


def _timestep_density(alphas: Tensor) -> Tensor:
    """Return the sampling density of the timesteps, (T,), up to a factor.

    Min-SNR's weights for epsilon (Hang et al. 2023) as a density instead of weights: no work is spent on timesteps
    of small weight. It is multiplied by t, which favours much noise, where the text determines the shape.
    """
    snr = alphas / (1 - alphas)
    return snr.clamp(max=_MIN_SNR_GAMMA) / snr * torch.arange(1, len(snr) + 1)


def _agree(spent: float, world_size: int) -> float:
    """Return the largest share that any process has spent, so that all stop at the same step."""
    if world_size == 1:
        return spent
    value = torch.tensor([spent], dtype=torch.float64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _drop_captions(embed: TextEmbedder, captions: list[str], rng: random.Random) -> tuple[Tensor, Tensor]:
    draws = [rng.random() for _ in captions]
    prompt_embeds, pooled = embed(
        ["" if draw < _DROP_TO_EMPTY else caption for draw, caption in zip(draws, captions, strict=True)]
    )
    keep = torch.tensor([not _DROP_TO_EMPTY <= draw < _DROP for draw in draws], dtype=torch.float32)
    return prompt_embeds * keep[:, None, None], pooled * keep[:, None]


def _stratified_timesteps(size: int, density: Tensor) -> Tensor:
    """Return one timestep from each of `size` strata of equal mass under `density`, shuffled, (size,): this reduces variance."""
    quantiles = (torch.arange(size) + torch.rand(size)) / size
    cumulated = density.cumsum(0) / density.sum()
    timesteps = torch.searchsorted(cumulated, quantiles).clamp(max=len(density) - 1)
    return timesteps[torch.randperm(size)]


def _average_gradients(parameters: list[Tensor], world_size: int) -> None:
    if world_size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size
    torch._foreach_copy_(
        gradients,
        [
            part.view_as(g)
            for part, g in zip(flat.split([g.numel() for g in gradients]), gradients, strict=True)
        ],
    )
