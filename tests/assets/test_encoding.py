"""Holds that the encoding assets pass their settings on, and say honestly what was encoded, what was not, and what is lost."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.checks.result_checks import check_latents, check_text
from sdxl_pipeline.runtime.specs import (
    EncodeLatentsSpec,
    EncodeTextSpec,
    FailedItem,
    LatentCache,
    TextEmbedCache,
)
from tests.assets.test_graph import materialize, metadata

LATENTS = LatentCache(
    identity="", store_root="", entries_path="", digest="", planned=10, encoded=4, reused=6, failed=(),
    seconds=1.0, images_per_second=1.0, bytes=1, latent_mean=(0.0,), latent_std=(1.0,), measured=10, sample_path=None,
)  # fmt: skip
TEXTS = TextEmbedCache(
    identity="", store_root="", entries_path="", prompts_path="", digest="", captions=5, encoded=5, reused=0,
    truncated=(), seconds=1.0, captions_per_second=1.0, bytes=1,
)  # fmt: skip


def passed(results: list[dg.AssetCheckResult]) -> dict[str, bool]:
    return {str(result.check_name): result.passed for result in results}


@pytest.mark.parametrize(
    ("changes", "complete", "sound"),
    [
        ({}, True, True),
        ({"encoded": 3}, False, True),
        ({"encoded": 3, "failed": (FailedItem(name="a", reason="b"),)}, False, True),
        ({"encoded": 0, "deferred": 4, "latent_mean": (), "latent_std": (), "measured": 0}, True, True),
        ({"latent_std": (0.0,)}, True, False),
        ({"latent_mean": (float("nan"),)}, True, False),
    ],
)
def test_latents_are_accounted_for(changes: dict[str, Any], complete: bool, sound: bool):
    results = check_latents(LATENTS.model_copy(update=changes))
    assert passed(results) == {"latents_complete": complete, "latents_sound": sound}
    if not changes.get("measured", 1):
        assert "None was looked at" in str(results[1].description)


@pytest.mark.parametrize(
    ("windows", "cut", "remedy"),
    [(1, 2, '"tokenizer_max_length": 154'), (2, 2, '"tokenizer_max_length": 231'), (3, 2, "Shorten them"), (1, 0, "0 of 5")],
)  # fmt: skip
def test_captions_that_lose_their_tail_come_with_a_remedy(windows: int, cut: int, hint: str):
    (result,) = check_text(TEXTS.model_copy(update={"windows": windows, "truncated_count": cut}))
    assert result.passed == (cut == 0)
    assert hint in str(result.description)


def test_what_was_not_counted_is_not_called_whole():
    (result,) = check_text(TEXTS.model_copy(update={"truncated_count": None}))
    assert "Not counted" in str(result.description)


def test_modes_and_windows_reach_the_stages(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], own_storage: Path
):
    folder = make_project(
        images=4,
        config={"tokenizer_max_length": 154},
        dataset={"vae_cache_ondemand": True, "skip_file_discovery": "text"},
    )
    caption = "a wide red square beside a small blue circle " * 12
    (folder / "data" / "image_01.txt").write_text(caption)
    stages = ("base_model", "dataset", "aspect_buckets", "vae_latents", "text_embeds")
    result = materialize(instance, folder, *stages)
    latents = metadata(result, "small", "shapes", "vae_latents")
    assert (latents["encoded"], latents["deferred"]) == (0, 4)
    assert "scaled_latents" not in latents
    texts = metadata(result, "small", "shapes", "text_embeds")
    assert texts["windows_of_77_tokens"] == 2
    assert (texts["encoded"], texts["truncated_count"]) == (7, 0)
    verdicts = {
        evaluation.check_name: evaluation.passed for evaluation in result.get_asset_check_evaluations()
    }
    assert verdicts["latents_complete"]
    assert verdicts["latents_sound"]
    assert verdicts["may_fit_the_encoders"]
    work = own_storage / "work" / "small" / "shapes"
    spec = EncodeLatentsSpec.model_validate_json(
        (work / "vae_latents" / "encode_latents.spec.json").read_text()
    )
    assert (spec.mode, spec.trust_recorded) == ("ondemand", False)
    text = EncodeTextSpec.model_validate_json((work / "text_embeds" / "encode_text.spec.json").read_text())
    assert (text.mode, text.trust_recorded, text.windows) == ("full", True, 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_max_length": 77}))
    shorter = materialize(instance, folder, "text_embeds")
    cut = metadata(shorter, "small", "shapes", "text_embeds")
    assert cut["truncated_count"] == 1
    assert "**loses:**" in cut["truncated"]
    (check,) = shorter.get_asset_check_evaluations()
    assert not check.passed
    assert "tokenizer_max_length" in str(check.description)
