"""CLIP score: how well an image matches its prompt (Hessel et al. 2021, "CLIPScore", with the commonly used factor of 100)."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

from sdxl_pipeline.runtime.evaluation_report import ClipSummary

BATCH_SIZE = 16


class ClipScorer:
    """A CLIP model with its tokenizer and image processor, loaded once from a local folder."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.model = CLIPModel.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
        self.model.eval().to(device)
        self.tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
        self.processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Return 100 * max(cosine, 0) of each image with its own prompt, in [0, 100]."""
        scores: list[float] = []
        for start in range(0, len(images), BATCH_SIZE):
            stop = start + BATCH_SIZE
            similarity = self.cosine_similarity(images[start:stop], prompts[start:stop])
            scores += (100 * similarity.diagonal().clamp(min=0)).tolist()
        return scores

    @torch.no_grad()
    def cosine_similarity(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Return the cosine of every image with every prompt, (images, prompts). Prompts are truncated to the encoder's 77 tokens."""
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        pixels = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        embeds = self.model(**text.to(self.model.device), **pixels.to(self.model.device))
        # CLIPModel returns both embeddings normalized to unit length.
        return (embeds.image_embeds @ embeds.text_embeds.T).cpu()


def matching_margins(cosines: np.ndarray, captions: Sequence[str]) -> np.ndarray | None:
    """Return by how much each image is nearer to its own caption than to the other captions on average: (images,).

    `cosines` is (images, captions), the caption of image i being `captions[i]`. None if an image has no other caption to compare with,
    because there are fewer than two different ones.
    """
    texts = np.asarray(captions, dtype=object)
    others = texts[:, None] != texts[None, :]
    if not others.any():
        return None
    return np.diagonal(cosines) - (cosines * others).sum(axis=1) / others.sum(axis=1)


def summarize(scores: Sequence[float]) -> ClipSummary:
    """Return minimum, maximum, mean and population standard deviation."""
    return ClipSummary(
        min=min(scores), max=max(scores), mean=statistics.fmean(scores), std=statistics.pstdev(scores)
    )
