"""The UNet receives SDXL's time ids of the planned crops in float32, and the cached empty prompt for dropped captions."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training import trainer
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from tests.support.encoded_datasets import SilentReporter, prepare_dataset, write_images
from tests.support.training_datasets import make_spec

STEPS, BATCH = 16, 3
DROPOUT = 0.4
WIDTH, HEIGHT = 1820, 910  # in bfloat16 the neighbours are 1816 and 1824


@pytest.mark.usefixtures("one_thread", "fresh_accelerator")
def test_train_unet_inputs_match_crop_plan_and_caption_dropout(tmp_path: Path, monkeypatch):
    calls: list[dict[str, Any]] = []
    build = trainer.build_trainable

    def build_with_hook(spec):
        trainable = build(spec)
        trainable.unet.register_forward_pre_hook(
            lambda unet, args, kwargs: calls.append(kwargs), with_kwargs=True
        )
        return trainable

    monkeypatch.setattr(trainer, "build_trainable", build_with_hook)
    write_images(tmp_path / "images", count=3, size=(WIDTH, HEIGHT))
    spec = make_spec(
        tmp_path,
        mixed_precision="bf16",
        max_train_steps=STEPS,
        train_batch_size=BATCH,
        caption_dropout_probability=DROPOUT,
    )
    dataset = prepare_dataset(
        tmp_path / "dataset", tmp_path / "images", spec.base_model, crop=True, crop_aspect="square"
    )
    main(spec.model_copy(update={"datasets": (dataset,)}), SilentReporter(), StopSignal())
    assert len(calls) == STEPS

    rows = pd.read_parquet(dataset.rows_path).set_index("key")
    assert ((rows["crop_top"] > 0) | (rows["crop_left"] > 0)).all(), "the crops are at random positions"
    assert len(rows.groupby(["crop_top", "crop_left"])) == len(rows) == 3
    columns = ["original_h", "original_w", "crop_top", "crop_left", "bucket_h", "bucket_w"]
    sizes = {tuple(size) for size in rows[["original_h", "original_w"]].to_numpy().tolist()}
    assert sizes == {(HEIGHT, WIDTH), (WIDTH, HEIGHT)}
    texts = pd.read_parquet(Path(dataset.text_embeds.entries_path)).set_index("key")["embed_key"]
    prompts = pd.read_parquet(dataset.text_embeds.prompts_path).set_index("prompt")["embed_key"]
    store = TensorStore(Path(dataset.text_embeds.store_root))
    empty = store.read(prompts[""])

    sampler = BucketBatchSampler(
        load_samples([dataset], "train"), {dataset.dataset_id: 1.0}, spec.settings.seed, BATCH
    )
    dropped = 0
    for index, kwargs in enumerate(calls):
        keys = [ref.sample.key for ref in sampler.batch(index, 0)]
        time_ids = kwargs["added_cond_kwargs"]["time_ids"]
        assert time_ids.dtype == torch.float32
        assert time_ids.tolist() == rows.loc[keys, columns].astype(float).to_numpy().tolist()
        for item, key in enumerate(keys):
            actual = (kwargs["encoder_hidden_states"][item], kwargs["added_cond_kwargs"]["text_embeds"][item])
            caption = store.read(texts[key])
            is_dropped = torch.equal(actual[0], empty["prompt_embeds"].to(torch.bfloat16))
            expected = empty if is_dropped else caption
            assert torch.equal(actual[0], expected["prompt_embeds"].to(torch.bfloat16))
            assert torch.equal(actual[1], expected["pooled_prompt_embeds"].to(torch.bfloat16))
            dropped += is_dropped
    # 48 samples at a rate of 0.4: within 2.5 standard deviations
    assert dropped / (STEPS * BATCH) == pytest.approx(DROPOUT, abs=0.18)
