"""Contrastive training of the scoring CLIP and both text encoders on images and captions (Radford et al. 2021)."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizerFast

from sdxl_pipeline.demo.render import render
from sdxl_pipeline.demo.shape_captions import canonical_caption, sample_caption
from sdxl_pipeline.demo.shape_world import (
    BUCKETS,
    PLACES,
    SIZES,
    Spec,
    held_out_specs,
    sample_frame,
    sample_plain,
    sample_rich,
)
from tools.tiny_sdxl.architecture import (
    CLIP_IMAGE_SIZE,
    TEXT_WIDTH,
    build_clip,
    build_first_text_encoder,
)
from tools.tiny_sdxl.budget import Budget, set_learning_rate
from tools.tiny_sdxl.bundle import load_tokenizer, save_image_processor, second_text_encoder

_LOGGER = logging.getLogger(__name__)
_BATCH = 192
_PEAK_RATE = 1.5e-3
# Batches are made of groups of this many images; a rich group is random, the images of a plain one differ little.
_GROUP = 4
_RICH_SHARE = 0.4
_MAX_LOGIT_SCALE = 60.0


class CaptionIds:
    """Cached token ids of captions without common padding at the end.

    The towers are causal and pool at the end-of-text token, so omitting padding changes nothing.
    """

    def __init__(self, tokenizer: CLIPTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Return ids (B, longest) of `captions`, padded with the end-of-text token."""
        for caption in captions:
            if caption not in self._known:
                self._known[caption] = self._tokenizer(caption, truncation=True, max_length=77).input_ids
        rows = [torch.tensor(self._known[caption]) for caption in captions]
        return nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=float(self._tokenizer.eos_token_id)
        ).long()


def train_clip(parts: Path, budget: Budget, seed: int = 0) -> dict[str, float]:
    """Train, save clip, text_encoder and text_encoder_2 under `parts`, and return the held-out metrics."""
    torch.manual_seed(seed)
    rng = random.Random(seed + 2)
    tokenizer = load_tokenizer(parts)
    ids = CaptionIds(tokenizer)
    clip, first = build_clip(tokenizer), build_first_text_encoder(tokenizer)
    for model in (clip, first):
        model.set_attn_implementation(
            "eager"
        )  # on CPUs with AMX twice as fast as the fused attention's backward
    first_projection = nn.Linear(TEXT_WIDTH, TEXT_WIDTH, bias=False)
    parameters = [*clip.parameters(), *first.parameters(), *first_projection.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.02)
    step = 0
    while (spent := budget.spent(step)) < 1:
        set_learning_rate(optimizer, _PEAK_RATE, step, spent)
        images, captions = _batch(rng)
        tokens = ids(captions)
        with torch.autocast("cpu", torch.bfloat16):
            image_embeds = embed_images(clip, images)
            text_embeds = [embed_texts(clip, tokens), _embed_first(first, first_projection, tokens)]
        scale = clip.logit_scale.exp().clamp(max=_MAX_LOGIT_SCALE)
        same = torch.tensor([[a == b for b in captions] for a in captions])
        loss = torch.stack(
            [_contrast(image_embeds.float(), t.float(), scale, same) for t in text_embeds]
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            _LOGGER.info(
                f"clip step {step} seconds {budget.elapsed():.0f} loss {loss.item():.3f} {measure_clip(clip, ids)}"
            )
    first.save_pretrained(parts / "text_encoder")
    second_text_encoder(clip).save_pretrained(parts / "text_encoder_2")
    clip.save_pretrained(parts / "clip")
    save_image_processor(parts / "clip", tokenizer)
    return {**measure_clip(clip, ids), "steps": step, "seconds": round(budget.elapsed())}


@torch.no_grad()
def measure_clip(clip: CLIPModel, ids: CaptionIds, count: int = 256) -> dict[str, float]:
    """Return the share of `count` different held-out captions for which their own image is the nearest."""
    specs = held_out_specs(count, seed=7)
    images = render(specs, (128, 128), random.Random(7))
    image_embeds = embed_images(clip, to_clip_size(images))
    text_embeds = embed_texts(clip, ids([canonical_caption(spec, include_centre=True) for spec in specs]))
    nearest = (text_embeds @ image_embeds.T).argmax(1)
    return {"retrieval_top1": round((nearest == torch.arange(count)).float().mean().item(), 4)}


def embed_images(clip: CLIPModel, pixel_values: Tensor) -> Tensor:
    """Return unit embeddings (B, 64) of images (B, 3, 64, 64) in [-1, 1]."""
    return F.normalize(
        clip.visual_projection(clip.vision_model(pixel_values=pixel_values).pooler_output), dim=-1
    )


def embed_texts(clip: CLIPModel, input_ids: Tensor) -> Tensor:
    """Return unit embeddings (B, 64) of captions."""
    return F.normalize(clip.text_projection(clip.text_model(input_ids=input_ids).pooler_output), dim=-1)


def to_clip_size(images: Tensor) -> Tensor:
    """Resize images (B, 3, H, W) of any aspect to the square input of the vision tower."""
    side = (CLIP_IMAGE_SIZE, CLIP_IMAGE_SIZE)
    return F.interpolate(images, side, mode="bilinear", antialias=True, align_corners=False)


def _embed_first(encoder: CLIPTextModel, projection: nn.Linear, input_ids: Tensor) -> Tensor:
    return F.normalize(projection(encoder(input_ids=input_ids).pooler_output), dim=-1)


def _contrast(image_embeds: Tensor, text_embeds: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """Return the symmetric cross entropy, (); pairs whose captions are the `same` text are not negatives."""
    count = len(image_embeds)
    logits = (scale * text_embeds @ image_embeds.T).masked_fill(
        same & ~torch.eye(count, dtype=torch.bool), -1e4
    )
    labels = torch.arange(count)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _sample_group(rng: random.Random) -> list[Spec]:
    """Return the specs of four images. Plain ones share shape and colours, so that the model must distinguish sizes and places."""
    if rng.random() < _RICH_SHARE:
        return [sample_rich(rng) for _ in range(_GROUP)]
    first = sample_plain(rng)
    variants = [(size, place) for size in SIZES for place in PLACES]
    return [replace(first, size=size, place=place) for size, place in rng.sample(variants, _GROUP)]


def _batch(rng: random.Random) -> tuple[Tensor, list[str]]:
    """Return images (192, 3, 64, 64) and their captions: half square, a quarter of each other aspect.

    They are rendered at half size, because they are resized to 64x64 anyway.
    """
    images, captions = [], []
    for (height, width), share in zip(BUCKETS, (2, 1, 1), strict=True):
        count = _BATCH * share // 4
        specs = [spec for _ in range(count // _GROUP) for spec in _sample_group(rng)]
        size = (height // 2, width // 2)
        frames = [sample_frame(rng, (height, width)) if rng.random() < 0.3 else (*size, 0, 0) for _ in specs]
        halved = [(h, w, top // 2, left // 2) for h, w, top, left in frames]
        images.append(to_clip_size(render(specs, size, rng, halved)))
        captions += [sample_caption(spec, rng) for spec in specs]
    return torch.cat(images), captions
