"""Batches: cached tensors of matching images, caption dropout, and noise that depends only on (seed, step, slot)."""

from collections import Counter
from contextlib import closing

import pytest
import torch

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import (
    BatchReader,
    MismatchedBatchError,
    TrainingBatches,
    prefetch,
)
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.diffusion.forward_process import ForwardProcess, TimestepSampler
from tests.support.training_datasets import PROMPT, digest, make_dataset

SCALE = 0.25


def make_batches(
    dataset, batch_size=2, num_processes=1, rank=0, dropout=0.0, seed=5, accumulation=1
) -> TrainingBatches:
    samples = load_samples([dataset], "train")
    return TrainingBatches(
        order=BucketBatchSampler(samples, {dataset.dataset_id: 1.0}, seed, batch_size, num_processes),
        reader=BatchReader([dataset]),
        scaling_factor=SCALE,
        forward_process=ForwardProcess(TimestepSampler(1000), accumulation=accumulation),
        caption_dropout_probability=dropout,
        rank=rank,
    )


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset")


def assert_same(one, other):
    assert one.keys == other.keys
    for name in ("latents", "noise", "timesteps", "prompt_embeds", "pooled_prompt_embeds", "time_ids"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_read_tensors_equal_the_stored_entries_of_the_images(dataset):
    batches = make_batches(dataset)
    latent_store = TensorStore(dataset.latents.store_root)
    text_store = TensorStore(dataset.text_embeds.store_root)
    for index in range(6):
        batch = batches.read(index)
        refs = batches.order.batch(index, 0)
        assert batch.keys == tuple(ref.sample.key for ref in refs)
        for position, ref in enumerate(refs):
            stored = latent_store.read(digest("latent", batch.keys[position]))
            # a sample is within 6 standard deviations of the posterior, exp(-2) each
            assert (batch.latents[position] / SCALE - stored["mean"]).abs().max() < 6 * torch.tensor(
                -2.0
            ).exp()
            assert not torch.equal(batch.latents[position] / SCALE, stored["mean"])
            text = text_store.read(ref.embed_key)
            assert torch.equal(batch.prompt_embeds[position], text["prompt_embeds"])
            assert torch.equal(batch.pooled_prompt_embeds[position], text["pooled_prompt_embeds"])
            assert batch.time_ids[position].tolist() == list(ref.sample.time_ids)
        assert batch.time_ids.dtype == torch.float32
        assert batch.timesteps.dtype == torch.int64


@pytest.mark.parametrize(
    ("batch_size", "num_processes", "accumulation"), [(2, 1, 1), (2, 1, 3), (1, 2, 2), (2, 3, 2), (4, 2, 5)]
)
def test_read_step_weight_gives_all_images_of_a_step_equal_weight(
    dataset, batch_size, num_processes, accumulation
):
    ranks = [
        make_batches(dataset, batch_size, num_processes, rank, accumulation=accumulation)
        for rank in range(num_processes)
    ]
    placeholders = 0
    for step in range(4):
        weights: dict[tuple[int, str], float] = {}
        images = 0
        for index in range(step * accumulation, (step + 1) * accumulation):
            parts = [batches.read(index) for batches in ranks]
            images += parts[0].images
            assert {part.images for part in parts} == {ranks[0].order.size(index)}
            for part in parts:
                assert len(part.latents) == len(part.keys) >= 1, "every process has a batch"
                placeholders += not part.step_weight
                for key in part.keys if part.step_weight else ():
                    # data parallelism averages the mean losses of the processes
                    weights[index, key] = part.step_weight / len(part.keys) / num_processes
        assert len(weights) == images
        assert list(weights.values()) == pytest.approx([1 / images] * images)
    assert bool(placeholders) == (num_processes > 1 and batch_size < 4)


def test_read_latents_are_resampled_from_the_posterior_at_each_appearance(dataset):
    batches, store = make_batches(dataset), TensorStore(dataset.latents.store_root)
    deviations_by_key: dict[str, list[torch.Tensor]] = {}
    for index in range(60):
        batch = batches.read(index)
        for key, latents in zip(batch.keys, batch.latents, strict=True):
            stored = store.read(digest("latent", key))
            deviation = (latents / SCALE - stored["mean"]) / torch.exp(stored["logvar"] / 2)
            deviations_by_key.setdefault(key, []).append(deviation)
    assert min(map(len, deviations_by_key.values())) > 1
    for deviations in deviations_by_key.values():
        assert not torch.equal(deviations[0], deviations[1])
    values = torch.cat([deviation.flatten() for some in deviations_by_key.values() for deviation in some])
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


def test_read_is_a_pure_function_of_the_index(dataset):
    sequential = [make_batches(dataset).read(index) for index in range(5)]
    other = make_batches(dataset)
    torch.manual_seed(99)  # torch's global generator is not used
    for index in (4, 2):
        assert_same(other.read(index), sequential[index])
    assert not torch.equal(make_batches(dataset, seed=6).read(0).noise, sequential[0].noise)


def test_read_on_two_processes_equals_one_process_with_twice_the_batch_size(dataset):
    one_process = make_batches(dataset, batch_size=2, dropout=0.5)
    two_processes = [
        make_batches(dataset, batch_size=1, num_processes=2, rank=rank, dropout=0.5) for rank in range(2)
    ]
    for index in range(8):
        full = one_process.read(index)
        parts = [part for batches in two_processes if (part := batches.read(index)).step_weight]
        assert full.keys == sum((part.keys for part in parts), ())
        for name in ("latents", "noise", "timesteps", "prompt_embeds", "time_ids"):
            assert torch.equal(getattr(full, name), torch.cat([getattr(part, name) for part in parts]))


def test_read_noise_and_timesteps_follow_their_distributions(dataset):
    batches = make_batches(dataset)
    read = [batches.read(index) for index in range(150)]
    noise = torch.cat([batch.noise.flatten() for batch in read])
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    timesteps = torch.cat([batch.timesteps for batch in read]).float()
    assert timesteps.min() < 30
    assert timesteps.max() > 970
    assert abs(timesteps.mean() - 499.5) < 60


def test_read_caption_dropout_uses_the_empty_prompt_at_its_rate(dataset):
    batches = make_batches(dataset, dropout=0.3)
    text_store = TensorStore(dataset.text_embeds.store_root)
    empty = text_store.read(digest("text", "prompt", ""))
    kinds: Counter[str] = Counter()
    for index in range(300):
        batch = batches.read(index)
        for position, ref in enumerate(batches.order.batch(index, 0)):
            caption = text_store.read(ref.embed_key)
            for kind, text in (("dropped", empty), ("kept", caption)):
                if torch.equal(batch.prompt_embeds[position], text["prompt_embeds"]):
                    assert torch.equal(batch.pooled_prompt_embeds[position], text["pooled_prompt_embeds"])
                    kinds[kind] += 1
    assert kinds.total() == batches.order.images_until(300)
    assert abs(kinds["dropped"] / 600 - 0.3) < 0.06
    assert torch.equal(make_batches(dataset, dropout=1.0).read(0).prompt_embeds[0], empty["prompt_embeds"])


def test_read_reversed_latents_raise_mismatched_batch_error(dataset, monkeypatch):
    batches = make_batches(dataset)
    batches.read(0)
    original = BatchReader.posteriors
    monkeypatch.setattr(BatchReader, "posteriors", lambda self, samples: original(self, samples[::-1]))
    with pytest.raises(MismatchedBatchError, match="batch 0"):
        batches.read(0)


def test_batch_reader_without_empty_prompt_raises(dataset):
    import pandas as pd

    path = dataset.text_embeds.prompts_path
    table = pd.read_parquet(path)
    table[table["prompt"] != ""].to_parquet(path)
    with pytest.raises(UserError, match="lacks the empty prompt"):
        BatchReader([dataset])


def test_prompt_embeds_are_read_by_prompt_text(dataset):
    reader = BatchReader([dataset])
    embeds, pooled = reader.prompt_embeds(PROMPT)
    stored = TensorStore(dataset.text_embeds.store_root).read(digest("text", "prompt", PROMPT))
    assert torch.equal(embeds[0], stored["prompt_embeds"])
    assert torch.equal(pooled[0], stored["pooled_prompt_embeds"])
    with pytest.raises(UserError, match="'a blue square' has not been encoded"):
        reader.prompt_embeds("a blue square")


def test_prefetch_batches_equal_read_batches_and_errors_propagate(dataset, monkeypatch):
    batches = make_batches(dataset)
    with closing(prefetch(batches, 3, 9, pin=False)) as prefetched_batches:
        read = list(prefetched_batches)
    assert len(read) == 6
    for index, batch in enumerate(read, start=3):
        assert_same(batch, batches.read(index))

    original = TrainingBatches.read

    def fail_at_index_4(self, index):
        if index == 4:
            raise OSError("disk gone")
        return original(self, index)

    monkeypatch.setattr(TrainingBatches, "read", fail_at_index_4)
    with closing(prefetch(batches, 3, 9, pin=False)) as prefetched_batches:
        assert_same(next(prefetched_batches), original(batches, 3))
        with pytest.raises(OSError, match="disk gone"):
            next(prefetched_batches)
