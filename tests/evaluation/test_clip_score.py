"""CLIP score: 100 * max(cosine, 0), equal to a computation from the two towers, and loadable from published CLIP folders."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_pipeline.evaluation.clip_score import BATCH_SIZE, ClipScorer, summarize
from sdxl_pipeline.evaluation.scoring_model import choose_files, scoring_model_folder, scoring_model_name
from sdxl_pipeline.models.base_model import BUNDLED_CLIP
from sdxl_pipeline.runtime.stage_runner import UserError
from tests.support.evaluation_specs import tiny_model, tiny_settings
from tests.support.hub_server import HubServer


@pytest.fixture(scope="module")
def scorer() -> ClipScorer:
    return ClipScorer(BUNDLED_CLIP)


def noise_image(seed: int, size: tuple[int, int] = (96, 128)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_scores_equal_cosine_of_tower_projections(scorer: ClipScorer):
    """The expected value comes from manual preprocessing and the towers' own projections."""
    image, prompt = noise_image(0, (64, 64)), "a red circle"
    side = scorer.model.config.vision_config.image_size
    pixels = (
        torch.from_numpy(np.asarray(image.resize((side, side)))).float().permute(2, 0, 1)[None] / 127.5 - 1
    )
    tokens = scorer.tokenizer([prompt], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        image_embeds = scorer.model.visual_projection(
            scorer.model.vision_model(pixel_values=pixels).pooler_output
        )[0]
        text_embeds = scorer.model.text_projection(scorer.model.text_model(**tokens).pooler_output)[0]
    cosine = torch.nn.functional.cosine_similarity(image_embeds, text_embeds, dim=0).item()
    assert scorer.cosine_similarity([image], [prompt]).item() == pytest.approx(cosine, abs=1e-4)
    assert scorer.scores([image], [prompt])[0] == pytest.approx(max(100 * cosine, 0), abs=1e-2)


def test_scores_negative_cosine_is_clamped_to_0(scorer: ClipScorer):
    images = [noise_image(seed) for seed in range(6)]
    prompts = ["a red circle", "a blue star on a green background", "", "triangle", "a photo", "x " * 200]
    cosines = scorer.cosine_similarity(images, prompts)
    assert cosines.abs().max() <= 1 + 1e-5
    for (row, column), cosine in np.ndenumerate(cosines.numpy()):
        (score,) = scorer.scores([images[row]], [prompts[column]])
        assert score == pytest.approx(max(100 * cosine, 0), abs=1e-3)


def test_scores_do_not_depend_on_batch(scorer: ClipScorer):
    images = [noise_image(seed) for seed in range(BATCH_SIZE + 2)]
    prompts = [f"image {seed}" for seed in range(BATCH_SIZE + 2)]
    together = scorer.scores(images, prompts)
    assert len(together) == BATCH_SIZE + 2
    for index in (0, BATCH_SIZE, BATCH_SIZE + 1):
        alone = scorer.scores([images[index]], [prompts[index]])
        assert alone[0] == pytest.approx(together[index], abs=1e-3)


def test_summarize_returns_population_statistics():
    summary = summarize([10.0, 20.0, 30.0])
    assert (summary.min, summary.max, summary.mean) == (10.0, 30.0, 20.0)
    assert summary.std == pytest.approx(math.sqrt(200 / 3))


def test_scoring_model_of_bundled_base_model_defaults_to_bundled_clip(tmp_path: Path):
    unset = {"pretrained_evaluation_model_name_or_path": None}
    bundled = tiny_settings(pretrained_model_name_or_path="bundled:tiny-sdxl", **unset)
    model = tiny_model(bundled, tmp_path)
    assert scoring_model_folder(bundled, model) == BUNDLED_CLIP
    assert scoring_model_name(bundled, model) == "bundled:tiny-clip"


def test_scoring_model_name_of_folder_has_no_path(tmp_path: Path):
    folder = tmp_path / "my-clip"
    shutil.copytree(BUNDLED_CLIP, folder)
    settings = tiny_settings(pretrained_evaluation_model_name_or_path=str(folder))
    model = tiny_model(settings, tmp_path)
    assert scoring_model_folder(settings, model) == folder
    assert scoring_model_name(settings, model) == "my-clip"


def test_scoring_model_folder_missing_path_raises(tmp_path: Path):
    settings = tiny_settings(pretrained_evaluation_model_name_or_path=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="is not an existing folder"):
        scoring_model_folder(settings, tiny_model(settings, tmp_path))


def test_choose_files_without_safetensors_raises():
    published = [
        "config.json",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "pytorch_model.bin",
        "tf_model.h5",
    ]
    with pytest.raises(UserError, match=r"no \.safetensors"):
        choose_files(published, "openai/some-clip")
    chosen = choose_files([*published, "model.safetensors"], "openai/some-clip")
    assert set(chosen) == {
        "config.json",
        "preprocessor_config.json",
        "vocab.json",
        "merges.txt",
        "model.safetensors",
    }


def test_scoring_model_folder_from_hub_skips_pickle_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "published"
    shutil.copytree(BUNDLED_CLIP, folder)
    (folder / "pytorch_model.bin").write_bytes(b"must not be downloaded")
    legacy_config = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 64,
        "crop_size": 64,
        "resample": 3,
    }
    legacy_config |= {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(legacy_config))
    settings = tiny_settings(pretrained_evaluation_model_name_or_path="someone/clip")
    model = tiny_model(settings, tmp_path)
    with HubServer() as hub:
        hub.adopt_process(monkeypatch, tmp_path / "hf_home")
        hub.add_repo("someone/clip", folder)
        downloaded = scoring_model_folder(settings, model)
        assert not [request for request in hub.requests if "pytorch_model" in request.path]
    assert scoring_model_name(settings, model) == "someone/clip"
    (score,) = ClipScorer(downloaded).scores([noise_image(0)], ["a red circle"])
    assert 0 <= score <= 100
