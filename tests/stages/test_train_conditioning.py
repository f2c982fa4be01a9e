"""Holds what reaches the UNet in a real run: SDXL's time ids of a random crop, in float32 whatever the precision, and the cached empty prompt for dropped captions."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import sdxl_pipeline.training.trainer as loop
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from tests.support.encoded_datasets import Silent, draw_images, prepare_dataset
from tests.support.training_datasets import make_spec

STEPS, BATCH = 16, 3
DROPPED = 0.4
WIDTH, HEIGHT = 1820, 910  # bfloat16 has 1824 next to 1816


@pytest.mark.usefixtures("one_thread", "fresh_accelerator")
def test_crops_and_captions_reach_the_unet_as_they_were_planned(tmp_path: Path, monkeypatch):
    calls: list[dict[str, Any]] = []
    build = loop.build_trainable

    def listened_to(spec):
        trainable = build(spec)
        trainable.unet.register_forward_pre_hook(
            lambda unet, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        return trainable

    monkeypatch.setattr(loop, "build_trainable", listened_to)
    draw_images(tmp_path / "images", count=3, size=(WIDTH, HEIGHT))
    spec = make_spec(
        tmp_path,
        mixed_precision="bf16",
        max_train_steps=STEPS,
        train_batch_size=BATCH,
        caption_dropout_probability=DROPPED,
    )
    dataset = prepare_dataset(
        tmp_path / "dataset", tmp_path / "images", spec.base_model, crop=True, crop_aspect="square"
    )
    main(spec.model_copy(update={"datasets": (dataset,)}), Silent(), StopSignal())
    assert len(calls) == STEPS

    rows = pd.read_parquet(dataset.rows_path).set_index("key")
    assert ((rows["crop_top"] > 0) | (rows["crop_left"] > 0)).all(), "the crops lie at random places"
    assert len(rows.groupby(["crop_top", "crop_left"])) == len(rows) == 3
    columns = ["original_h", "original_w", "crop_top", "crop_left", "bucket_h", "bucket_w"]
    sizes = {tuple(size) for size in rows[["original_h", "original_w"]].to_numpy().tolist()}
    assert sizes == {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}
    texts = pd.read_parquet(Path(dataset.text_embeds.entries_path)).set_index("key")["embed_key"]
    prompts = pd.read_parquet(dataset.text_embeds.prompts_path).set_index("prompt")["embed_key"]
    store = TensorStore(Path(dataset.text_embeds.store_root))
    empty = store.read(prompts[""])

    order = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, spec.settings.seed, BATCH
    )
    dropped = 0
    for index, told in enumerate(calls):
        keys = [draw.sample.key for draw in order.batch(index, 0)]
        time_ids = told["added_cond_kwargs"]["time_ids"]
        assert time_ids.dtype == torch.float32
        assert time_ids.tolist() == rows.loc[keys, columns].astype(float).to_numpy().tolist()
        for item, key in enumerate(keys):
            seen = (told["encoder_hidden_states"][item], told["added_cond_kwargs"]["text_embeds"][item])
            own = store.read(texts[key])
            is_dropped = torch.equal(seen[0], empty["prompt_embeds"].to(torch.bfloat16))
            expected = empty if is_dropped else own
            assert torch.equal(seen[0], expected["prompt_embeds"].to(torch.bfloat16))
            assert torch.equal(seen[1], expected["pooled_prompt_embeds"].to(torch.bfloat16))
            dropped += is_dropped
    # 48 draws at a rate of 0.4: within two and a half standard deviations
    assert dropped / (STEPS * BATCH) == pytest.approx(DROPPED, abs=0.18)
