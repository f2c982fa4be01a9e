"""The text stage encodes each caption and prompt once under its own key, and a stop keeps the finished entries."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sdxl_pipeline.cache.encode import caption_encoding, encoders
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME, ResolvedModel, resolve_base_model
from sdxl_pipeline.models.components import load_pipeline, load_tokenizers
from sdxl_pipeline.models.conditioning import PromptTokenizer
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeTextSpec, TextEmbedCache
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages import encode_text

CAPTIONS = [
    ("a.png", "a red circle"),
    ("a.png", "a round thing"),
    ("b.png", "a blue star"),
    ("c.png", "a red circle"),
]
LONG = "a large yellow square " * 30


def model(**settings: Any) -> ResolvedModel:
    training = TrainingSettings(**{"pretrained_model_name_or_path": BUNDLED_NAME, **settings})
    return resolve_base_model(training, Path.cwd())


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., EncodeTextSpec]:
    def make(
        captions: Sequence[tuple[str, str]] = CAPTIONS,
        prompts: tuple[str, ...] = ("a green square", "blurry"),
        base_model: ResolvedModel | None = None,
        shard_rows: int = 2,
        **hardware: Any,
    ) -> EncodeTextSpec:
        rows = [(path, f"key-of-{path}", caption) for path, caption in captions]
        pd.DataFrame(rows, columns=["path", "key", "caption"]).to_parquet(tmp_path / "captions.parquet")
        return EncodeTextSpec(
            base_model=base_model or model(),
            hardware=PRESETS["cpu"].model_copy(update={"text_encoder_batch_size": 2, **hardware}),
            captions_path=str(tmp_path / "captions.parquet"),
            extra_prompts=prompts,
            store_root=str(tmp_path / "store"),
            entries_path=str(tmp_path / "entries.parquet"),
            prompts_path=str(tmp_path / "prompts.parquet"),
            shard_rows=shard_rows,
        )

    return make


def run(
    spec: EncodeTextSpec, reporter: Reporter | None = None, stop: StopSignal | None = None
) -> TextEmbedCache:
    return encode_text.main(spec, reporter or Reporter(), stop or StopSignal())


def counts(cache: TextEmbedCache) -> tuple[int, int, int]:
    return cache.captions, cache.encoded, cache.reused


def test_encode_text_embeddings_equal_diffusers_pipeline(make_spec):
    spec = make_spec()
    cache = run(spec)
    assert counts(cache) == (6, 6, 0)
    entries, prompts = pd.read_parquet(spec.entries_path), pd.read_parquet(spec.prompts_path)
    assert [tuple(row) for row in entries[["path", "caption"]].itertuples(index=False)] == CAPTIONS
    assert list(entries["key"]) == [f"key-of-{path}" for path, _ in CAPTIONS]
    assert list(prompts["prompt"]) == ["", "a green square", "blurry"]
    store, pipeline = TensorStore(spec.store_root), load_pipeline(spec.base_model, torch.float32)
    embed_keys = dict(zip(entries["caption"], entries["embed_key"], strict=True))
    embed_keys |= dict(zip(prompts["prompt"], prompts["embed_key"], strict=True))
    assert len(embed_keys) == 6
    for caption, key in embed_keys.items():
        expected, _, expected_pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        stored = store.read(key)
        torch.testing.assert_close(stored["prompt_embeds"], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(stored["pooled_prompt_embeds"], expected_pooled[0], atol=1e-5, rtol=0)


def test_encode_text_manifest_describes_the_entries(make_spec):
    spec = make_spec()
    cache = run(spec)
    entries = pd.read_parquet(spec.entries_path)
    assert cache.digest == frame_digest(entries, ("key", "embed_key"))
    assert cache.bytes == 6 * (77 * 128 + 64) * 4
    assert cache.captions_per_second is not None
    assert cache.captions_per_second > 0
    assert cache.truncated == ()
    assert TextEmbedCache.model_validate_json(cache.model_dump_json()) == cache


def test_encode_text_second_run_does_not_load_the_encoders(make_spec, monkeypatch):
    first = run(make_spec())
    monkeypatch.setattr(encoders, "load_text_encoders", lambda *_: pytest.fail("encoders were loaded"))
    second = run(make_spec())
    assert counts(second) == (6, 0, 6)
    assert second.captions_per_second is None
    assert (second.digest, second.bytes) == (first.digest, first.bytes)


def test_encode_text_edited_caption_encodes_only_it(make_spec):
    first = run(make_spec())
    second = run(make_spec([*CAPTIONS[:-1], ("c.png", "a dark red circle")]))
    assert counts(second) == (7, 1, 6)
    assert second.digest != first.digest


def test_encode_text_other_prompts_keep_digest(make_spec):
    first = run(make_spec())
    second = run(make_spec(prompts=("another prompt",)))
    assert counts(second) == (5, 1, 4)
    assert second.digest == first.digest


def test_encode_text_without_captions_encodes_empty_prompt(make_spec):
    spec = make_spec([], prompts=("",))
    assert counts(run(spec)) == (1, 1, 0)
    assert list(pd.read_parquet(spec.prompts_path)["prompt"]) == [""]
    assert list(pd.read_parquet(spec.entries_path).columns) == ["path", "key", "caption", "embed_key"]


def test_encode_text_truncated_captions_are_listed_with_tails_also_when_cached(make_spec):
    captions = [*CAPTIONS, ("d.png", LONG)]
    first = run(make_spec(captions))
    assert (first.truncated, first.truncated_count) == ((LONG,), 1)
    assert LONG.endswith(first.truncated_tails[0] + " ")
    fitting = LONG[: -len(first.truncated_tails[0]) - 1]
    assert run(make_spec([("d.png", fitting)])).truncated_count == 0, "exactly the tail is lost"
    again = run(make_spec([*captions, ("e.png", "a star")]))
    assert again.encoded == 1
    assert again.truncated == (LONG,)
    assert run(make_spec([*captions, ("e.png", "a star")])).truncated == (LONG,)


def test_encode_text_recorded_token_counts_are_reused(make_spec, monkeypatch):
    captions = [*CAPTIONS, ("d.png", LONG)]
    run(make_spec(captions))
    counted: list[str] = []
    original = caption_encoding.token_counts
    monkeypatch.setattr(
        caption_encoding,
        "token_counts",
        lambda spec, new, stop: counted.extend(new) or original(spec, new, stop),
    )
    assert run(make_spec([*captions, ("e.png", "a star")])).truncated_count == 1
    assert counted == []
    Path(make_spec(captions).entries_path).with_suffix(".tokens.parquet").unlink()
    assert run(make_spec([*captions, ("e.png", "a sun")])).truncated_count == 1
    assert LONG in counted


def test_encode_text_truncated_captions_are_all_counted_and_first_20_listed(make_spec):
    captions = [(f"{index}.png", f"number {index} of " + LONG) for index in range(25)]
    cache = run(make_spec(captions, text_encoder_batch_size=32))
    assert cache.truncated_count == 25
    assert len(cache.truncated) == len(cache.truncated_tails) == 20


def test_encode_text_two_windows_have_longer_embeddings_and_other_keys(make_spec):
    captions = [*CAPTIONS, ("d.png", LONG)]
    one = run(make_spec(captions))
    spec = make_spec(captions).model_copy(update={"windows": 2})
    two = run(spec)
    assert counts(two) == (7, 7, 0)
    assert (two.windows, two.truncated_count) == (2, 0)
    assert two.digest != one.digest
    entries, prompts = pd.read_parquet(spec.entries_path), pd.read_parquet(spec.prompts_path)
    store = TensorStore(spec.store_root)
    for key in (*entries["embed_key"], *prompts["embed_key"]):
        assert store.read(key)["prompt_embeds"].shape == (154, 128)
        assert store.read(key)["pooled_prompt_embeds"].shape == (64,)
    assert run(make_spec(captions)).encoded == 0, "the entries with one window still exist"


@pytest.mark.parametrize("mode", ["ondemand", "disable"])
def test_encode_text_cache_mode_defers_missing_entries(make_spec, mode: str):
    deferred = run(make_spec().model_copy(update={"mode": mode}))
    assert (deferred.captions, deferred.encoded, deferred.reused, deferred.deferred) == (6, 0, 0, 6)
    assert deferred.truncated_count is None
    spec = make_spec()
    assert not Path(spec.store_root).exists()
    tables = pd.read_parquet(spec.entries_path), pd.read_parquet(spec.prompts_path)
    full = run(spec)
    assert counts(full) == (6, 6, 0)
    assert full.digest == deferred.digest
    pd.testing.assert_frame_equal(tables[0], pd.read_parquet(spec.entries_path))
    pd.testing.assert_frame_equal(tables[1], pd.read_parquet(spec.prompts_path))
    again = run(make_spec().model_copy(update={"mode": mode}))
    assert (again.reused, again.deferred) == ((6, 0) if mode == "ondemand" else (0, 6))


def test_encode_text_trust_recorded_skips_store_check(make_spec):
    first = run(make_spec())
    shutil.rmtree(make_spec().store_root)
    trusted = run(make_spec().model_copy(update={"trust_manifest": True}))
    assert counts(trusted) == (6, 0, 6)
    assert trusted.digest == first.digest
    assert counts(run(make_spec())) == (6, 6, 0)


def test_encode_text_renamed_images_keep_digest(make_spec):
    first = run(make_spec())
    spec = make_spec()
    table = pd.read_parquet(spec.captions_path)
    table["path"] = table["path"].map({"a.png": "z.png", "b.png": "deep/b.png", "c.png": "c.png"})
    table.iloc[::-1].to_parquet(spec.captions_path)
    second = run(spec)
    assert counts(second) == (6, 0, 6)
    assert second.digest == first.digest
    assert "z.png" in set(pd.read_parquet(spec.entries_path)["path"])


def test_encode_text_other_encoder_or_dtype_encodes_again_other_vae_does_not(make_spec, tmp_path: Path):
    run(make_spec())
    folder = shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    vae = folder / "vae" / "config.json"
    vae.write_text(vae.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    other_vae = model(pretrained_model_name_or_path=str(folder))
    assert other_vae.vae_digest != model().vae_digest
    assert counts(run(make_spec(base_model=other_vae))) == (6, 0, 6)
    text = folder / "text_encoder_2" / "config.json"
    text.write_text(text.read_text().replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 2e-05'))
    other_text = model(pretrained_model_name_or_path=str(folder))
    assert counts(run(make_spec(base_model=other_text))) == (6, 6, 0)
    in_bf16 = make_spec(mixed_precision="bf16")
    assert counts(run(in_bf16)) == (6, 6, 0)
    key = pd.read_parquet(in_bf16.prompts_path)["embed_key"][0]
    assert TensorStore(in_bf16.store_root).read(key)["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("precision", "hint"), [("bf16", "Set mixed_precision to no"), ("no", "change this caption")]
)
def test_encode_text_nonfinite_embedding_raises_with_caption_and_hint(
    make_spec, monkeypatch, precision, hint
):
    star = PromptTokenizer(load_tokenizers(model()))
    ids = star.to_windows(star.read(["a blue star"]))[0][0]

    def overflow_on_star(encoders: Any, input_ids: torch.Tensor, _: Any) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = torch.zeros(len(input_ids), 77, 128)
        embeds[(input_ids == ids).flatten(1).all(1)] = torch.nan
        return embeds, torch.zeros(len(input_ids), 64)

    monkeypatch.setattr(caption_encoding, "encode_tokens", overflow_on_star)
    with pytest.raises(UserError, match=rf"'a blue star'.*{hint}"):
        run(make_spec(mixed_precision=precision))


def test_encode_text_stopped_keeps_finished_entries(make_spec):
    stop = StopSignal()

    class StopAtOnce(Reporter):
        def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
            stop.request()

    spec = make_spec(shard_rows=100)
    with pytest.raises(StageStopped):
        run(spec, StopAtOnce(), stop)
    stored = len(TensorStore(spec.store_root))
    assert 2 <= stored < 6
    assert counts(run(spec)) == (6, 6 - stored, stored)


@pytest.mark.slow
def test_encode_text_program_writes_manifest(make_spec, tmp_path: Path):
    (tmp_path / "spec.json").write_text(make_spec().model_dump_json())
    completed = subprocess.run(
        [sys.executable, "-m", "sdxl_pipeline.stages.encode_text", str(tmp_path / "spec.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "6 captions: 6 to encode" in completed.stdout
    cache = TextEmbedCache.model_validate_json((tmp_path / "manifest.json").read_text())
    assert counts(cache) == (6, 6, 0)
