"""Image embeddings of CLIP and of self-supervised vision transformers such as DINOv2, for similarities between images."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, CLIPModel

from sdxl_pipeline.evaluation.clip_score import ClipScorer
from sdxl_pipeline.evaluation.scoring_model import PROCESSOR_CONFIG, ScoringModelFolders


class ImageEmbedder:
    """A vision model in a local folder: the projected image embedding of a CLIP model, else the last layer's CLS token.

    The whole image is resized to the model's square without keeping its aspect, as for CMMD (Jayasumana et al. 2024), so that nothing at
    the borders is cropped away.
    """

    def __init__(self, folder: Path, device: str = "cpu", model: nn.Module | None = None) -> None:
        """Load the model, unless `model` is that of `folder`, already loaded."""
        if model is None:
            model = AutoModel.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
            )
        self.model: Any = model.eval().to(device)
        self._device = device
        processor = json.loads((folder / PROCESSOR_CONFIG).read_text(encoding="utf-8"))
        self._size = _input_size(processor)
        self._mean, self._std = (
            torch.tensor(processor[name]).view(3, 1, 1) for name in ("image_mean", "image_std")
        )

    @torch.no_grad()
    def embed(self, image: Image.Image) -> np.ndarray:
        """Return the embedding of an image, normalized to unit length: float64 (D,). Alone, so that it depends on no other image."""
        pixels = self._preprocess(image)[None].to(self._device)
        if isinstance(self.model, CLIPModel):
            embeds = self.model.visual_projection(self.model.vision_model(pixels).pooler_output)
        else:
            embeds = self.model(pixels).last_hidden_state[:, 0]
        vector: np.ndarray = embeds[0].double().cpu().numpy()
        return vector / np.linalg.norm(vector)

    def _preprocess(self, image: Image.Image) -> Tensor:
        """Return the normalized pixels, (3, H, W)."""
        resized = image.convert("RGB").resize(self._size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
        return (pixels - self._mean) / self._std


@dataclass(frozen=True)
class ScoringModels:
    """The models that score images, each loaded once."""

    clip: ClipScorer
    clip_images: ImageEmbedder
    similarity: ImageEmbedder
    """The model of `clip_images` where no similarity model is configured."""

    def embed(self, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings of one image by the CLIP model and by the similarity model, (D,) each."""
        clip = self.clip_images.embed(image)
        return clip, clip if self.similarity is self.clip_images else self.similarity.embed(image)


def load_scoring_models(folders: ScoringModelFolders, device: str) -> ScoringModels:
    """Load the models that `require_scoring_models` found."""
    clip = ClipScorer(folders.clip, device)
    clip_images = ImageEmbedder(folders.clip, device, clip.model)
    shared = folders.similarity == folders.clip
    return ScoringModels(
        clip, clip_images, clip_images if shared else ImageEmbedder(folders.similarity, device)
    )


def _input_size(processor: dict[str, Any]) -> tuple[int, int]:
    """Return (width, height) of the model's input by its preprocessor_config.json: the crop, or without one the resized image."""
    size = processor["crop_size" if "crop_size" in processor else "size"]
    if isinstance(size, int):
        return size, size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    return size["width"], size["height"]
