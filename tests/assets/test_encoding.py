"""The encoding assets: settings in the specs, and checks and metadata of encoded, deferred, failed and truncated entries."""

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
from tests.support.asset_graph import materialize, metadata

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
    ("changes", "complete", "valid"),
    [
        ({}, True, True),
        ({"encoded": 3}, False, True),
        ({"encoded": 3, "failed": (FailedItem(name="a", reason="b"),)}, False, True),
        ({"encoded": 0, "deferred": 4, "latent_mean": (), "latent_std": (), "measured": 0}, True, True),
        ({"latent_std": (0.0,)}, True, False),
        ({"latent_mean": (float("nan"),)}, True, False),
    ],
)
def test_check_latents_counts_and_statistics_decide(changes: dict[str, Any], complete: bool, valid: bool):
    results = check_latents(LATENTS.model_copy(update=changes))
    assert passed(results) == {"latents_complete": complete, "latents_valid": valid}
    if not changes.get("measured", 1):
        assert "No latent was measured" in str(results[1].description)


@pytest.mark.parametrize(
    ("windows", "truncated", "hint"),
    [(1, 2, '"tokenizer_max_length": 154'), (2, 2, '"tokenizer_max_length": 231'), (3, 2, "Shorten them"), (1, 0, "0 of 5")],
)  # fmt: skip
def test_check_text_truncated_captions_fail_with_a_hint(windows: int, truncated: int, hint: str):
    (result,) = check_text(TEXTS.model_copy(update={"windows": windows, "truncated_count": truncated}))
    assert result.passed == (truncated == 0)
    assert hint in str(result.description)


def test_check_text_deferred_captions_reports_that_they_are_not_counted():
    (result,) = check_text(TEXTS.model_copy(update={"truncated_count": None}))
    assert "Not counted" in str(result.description)


@pytest.mark.slow
def test_encoding_assets_modes_and_windows_are_in_the_specs(
    instance: dg.DagsterInstance, make_project: Callable[..., Path], isolated_storage: Path
):
    folder = make_project(
        images=4,
        config={"tokenizer_max_length": 154},
        dataset={"vae_cache_ondemand": True, "skip_file_discovery": "text"},
    )
    caption = "a wide red square beside a small blue circle " * 12
    (folder / "data" / "image_01.txt").write_text(caption)
    stages = ("base_model", "dataset", "aspect_buckets", "vae_latents", "text_embeds")
    result = materialize(instance, folder, *stages, in_process=False)
    latents = metadata(result, "small", "shapes_vae_latents")
    assert (latents["encoded"], latents["deferred"]) == (0, 4)
    assert "scaled_latents" not in latents
    texts = metadata(result, "small", "shapes_text_embeds")
    assert texts["windows_of_77_tokens"] == 2
    assert (texts["encoded"], texts["truncated_count"]) == (7, 0)
    checks = {evaluation.check_name: evaluation.passed for evaluation in result.get_asset_check_evaluations()}
    assert checks["latents_complete"]
    assert checks["latents_valid"]
    assert checks["captions_not_truncated"]
    work = isolated_storage / "work" / "small" / "shapes"
    spec = EncodeLatentsSpec.model_validate_json(
        (work / "vae_latents" / "encode_latents.spec.json").read_text()
    )
    assert (spec.mode, spec.trust_manifest) == ("ondemand", False)
    text = EncodeTextSpec.model_validate_json((work / "text_embeds" / "encode_text.spec.json").read_text())
    assert (text.mode, text.trust_manifest, text.windows) == ("full", True, 2)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer_max_length": 77}))
    shorter = materialize(instance, folder, "text_embeds")
    truncated = metadata(shorter, "small", "shapes_text_embeds")
    assert truncated["truncated_count"] == 1
    assert "**loses:**" in truncated["truncated"]
    (check,) = shorter.get_asset_check_evaluations()
    assert not check.passed
    assert "tokenizer_max_length" in str(check.description)
