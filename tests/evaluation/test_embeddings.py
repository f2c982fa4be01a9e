"""Image embeddings equal those of the models themselves, show the whole image, and load CLIP once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from sdxl_pipeline.evaluation.embeddings import ImageEmbedder, load_scoring_models
from sdxl_pipeline.evaluation.scoring_model import (
    ScoringModelFolders,
    require_scoring_models,
    similarity_model_name,
)
from sdxl_pipeline.models.base_model import BUNDLED_CLIP
from sdxl_pipeline.runtime.stage_runner import UserError
from tests.support.evaluation_specs import tiny_model, tiny_settings

SIDE = 28


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a DINOv2 model with random weights, in the layout of facebook/dinov2-small."""
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=14
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    processor = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": 32}}
    processor |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_embed_clip_equals_model_projection():
    image = noise_image(0, (64, 64))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
    model = CLIPModel.from_pretrained(BUNDLED_CLIP, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(
            input_ids=torch.tensor([[1022, 1023]]), pixel_values=pixels, attention_mask=torch.ones(1, 2)
        ).image_embeds[0]
    assert ImageEmbedder(BUNDLED_CLIP).embed(image) == pytest.approx(expected.numpy(), abs=1e-5)


def test_embed_dino_equals_normalized_cls_token(dino: Path):
    image = noise_image(1, (SIDE, SIDE))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = torch.from_numpy((np.array(image) / 255 - mean) / std).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(dino).eval()(pixels).last_hidden_state[0, 0].numpy()
    embedded = ImageEmbedder(dino).embed(image)
    assert embedded == pytest.approx(token / np.linalg.norm(token), abs=1e-5)
    assert np.linalg.norm(embedded) == pytest.approx(1)


def test_embed_wide_image_sees_its_borders(dino: Path):
    """A processor that crops the centre would not."""
    image = noise_image(2, (SIDE, 3 * SIDE))
    changed = image.copy()
    changed.paste("white", (0, 0, SIDE // 2, SIDE))
    embedder = ImageEmbedder(dino)
    assert np.abs(embedder.embed(image) - embedder.embed(changed)).max() > 1e-3


def test_load_scoring_models_loads_clip_once(dino: Path):
    models = load_scoring_models(ScoringModelFolders(BUNDLED_CLIP, BUNDLED_CLIP), "cpu")
    assert models.clip_images.model is models.clip.model
    assert models.similarity is models.clip_images
    models = load_scoring_models(ScoringModelFolders(BUNDLED_CLIP, dino), "cpu")
    clip, similarity = models.embed(noise_image(0, (64, 64)))
    assert (clip.shape, similarity.shape) == ((64,), (16,))


def test_require_scoring_models_returns_configured_folders(dino: Path, tmp_path: Path):
    settings = tiny_settings(num_caption_samples=4, pretrained_similarity_model_name_or_path=str(dino))
    model = tiny_model(settings, tmp_path)
    assert require_scoring_models(settings, model) == ScoringModelFolders(BUNDLED_CLIP, dino)
    assert similarity_model_name(settings, model) == dino.name
    without = tiny_settings()
    assert require_scoring_models(without, model) == ScoringModelFolders(BUNDLED_CLIP, BUNDLED_CLIP)
    assert similarity_model_name(without, model) == "bundled:tiny-clip"
    assert require_scoring_models(tiny_settings(evaluation_type="none"), model) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("pickle", r"pretrained_similarity_model_name_or_path: .* has no \.safetensors weights"),
        ("bert", r"model_type is 'bert'.*facebook/dinov2-small"),
        ("no processor", "has no preprocessor_config.json, so it is not a DINOv2 or CLIP model"),
        ("absent", "is not an existing folder"),
    ],
)
def test_require_scoring_models_unusable_similarity_model_raises(
    dino: Path, tmp_path: Path, change: str, message: str
):
    folder = tmp_path / "similarity"
    shutil.copytree(dino, folder)
    if change == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif change == "bert":
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    elif change == "no processor":
        (folder / "preprocessor_config.json").unlink()
    else:
        shutil.rmtree(folder)
    settings = tiny_settings(num_caption_samples=4, pretrained_similarity_model_name_or_path=str(folder))
    with pytest.raises(UserError, match=message):
        require_scoring_models(settings, tiny_model(settings, tmp_path))


def test_require_scoring_models_similarity_model_as_clip_model_raises(dino: Path, tmp_path: Path):
    settings = tiny_settings(pretrained_evaluation_model_name_or_path=str(dino))
    with pytest.raises(UserError, match=r"model_type is 'dinov2'\. Set it to a CLIP model"):
        require_scoring_models(settings, tiny_model(settings, tmp_path))
