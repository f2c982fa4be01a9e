"""Cache modes: for any mix of cached entries and entries encoded on first use, position i of a batch is image i, and runs are the same."""

import shutil
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.encode.encoders import CaptionEncoder, LatentEncoder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import Crop, crop_offset
from sdxl_pipeline.models.base_model import ResolvedModel, resolve_base_model
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import BatchReader, TrainingBatches
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.data.samples import Sample, load_samples
from sdxl_pipeline.training.diffusion.forward_process import ForwardProcess, TimestepSampler
from tests.support.encoded_datasets import HARDWARE, list_files, prepare_dataset, write_images
from tests.support.training_datasets import NEGATIVE, PROMPT, model_folder

LATENTS = ("mean", "logvar")
DEFERRED = ("ondemand", "disable")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    folder = tmp_path_factory.mktemp("model")
    settings = TrainingSettings(pretrained_model_name_or_path=str(model_folder()))
    return resolve_base_model(settings, folder, cache_dir=folder)


@pytest.fixture(scope="module")
def latent_encoder(model: ResolvedModel) -> LatentEncoder:
    return LatentEncoder(model, HARDWARE)


@pytest.fixture(scope="module")
def caption_encoder(model: ResolvedModel) -> CaptionEncoder:
    return CaptionEncoder(model, HARDWARE)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    write_images(folder)
    return folder


def reader_of(dataset: TrainingDataset, model: ResolvedModel) -> BatchReader:
    return BatchReader([dataset], OnDemandEncoders(model, HARDWARE))


def same_bucket(dataset: TrainingDataset) -> list[Sample]:
    """Return the images of one bucket."""
    samples = list(load_samples([dataset], "train"))
    return [sample for sample in samples if sample.bucket == samples[0].bucket]


def encode_file(dataset: TrainingDataset, encoder: LatentEncoder, sample: Sample) -> dict[str, torch.Tensor]:
    """Encode an image file directly, without a reader."""
    return encoder.encode(Path(dataset.data_dir) / sample.path, sample.crop)


def assert_position_is_image(
    dataset: TrainingDataset, encoder: LatentEncoder, reader: BatchReader, samples: list[Sample]
) -> None:
    posteriors = reader.posteriors(samples)
    assert posteriors.keys == tuple(sample.key for sample in samples)
    expected = [encode_file(dataset, encoder, sample) for sample in samples]
    assert not torch.equal(expected[0]["mean"], expected[1]["mean"]), "a reversed batch would not be detected"
    for position, posterior in enumerate(expected):
        torch.testing.assert_close(posteriors.mean[position], posterior["mean"].float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            posteriors.logvar[position], posterior["logvar"].float(), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("mode", ["full", *DEFERRED])
def test_posteriors_position_i_is_image_i_in_every_mode(tmp_path, images, model, latent_encoder, mode):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache=mode)
    samples = same_bucket(dataset)
    reader = reader_of(dataset, model)
    assert len(samples) == 3
    # entries are cached only in full mode
    assert_position_is_image(dataset, latent_encoder, reader, samples)
    assert_position_is_image(dataset, latent_encoder, reader, samples[::-1])
    reader.close()
    assert_position_is_image(
        dataset, latent_encoder, reader_of(dataset, model), [samples[2], samples[0], samples[1]]
    )


@pytest.mark.parametrize("present", [[0], [1], [2], [0, 2]])
def test_posteriors_position_i_is_image_i_with_a_partial_store(
    tmp_path, images, model, latent_encoder, present
):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand")
    samples = same_bucket(dataset)
    with_some = reader_of(dataset, model)
    with_some.posteriors([samples[index] for index in present])
    with_some.close()
    store = TensorStore(dataset.latents.store_root)
    assert len(store) == len(present)
    reader = reader_of(dataset, model)
    assert_position_is_image(dataset, latent_encoder, reader, samples)
    reader.flush()
    store.refresh()
    assert len(store) == 3
    assert_position_is_image(dataset, latent_encoder, reader, [*samples, samples[0]])


@pytest.mark.parametrize("mode", ["full", *DEFERRED])
def test_text_embeds_position_i_is_the_caption_of_image_i(tmp_path, images, model, caption_encoder, mode):
    dataset = prepare_dataset(tmp_path, images, model, text_cache=mode)
    samples = list(load_samples([dataset], "train"))
    reader, encoder = reader_of(dataset, model), caption_encoder
    for ordered in (samples[:3], samples[::-1], [samples[1], samples[4], samples[0], samples[1]]):
        texts = reader.text_embeds(ordered, [sample.embed_keys[0] for sample in ordered])
        for position, sample in enumerate(ordered):
            caption = (images / sample.path).with_suffix(".txt").read_text().strip()
            expected = encoder.encode(caption)
            torch.testing.assert_close(
                texts.prompt_embeds[position], expected["prompt_embeds"], rtol=1e-3, atol=1e-3
            )
            torch.testing.assert_close(
                texts.pooled_prompt_embeds[position], expected["pooled_prompt_embeds"], rtol=1e-3, atol=1e-3
            )
    reader.close()
    written = len(TensorStore(dataset.text_embeds.store_root))
    assert written == {"full": 9, "ondemand": 6, "disable": 0}[mode]


@pytest.mark.parametrize("mode", DEFERRED)
def test_prompt_embeds_are_available_in_every_mode(tmp_path, images, model, caption_encoder, mode):
    dataset = prepare_dataset(tmp_path, images, model, text_cache=mode)
    reader, encoder = reader_of(dataset, model), caption_encoder
    conditioning = reader.conditioning(PROMPT, NEGATIVE, zeros_for_empty_prompt=True)
    assert torch.equal(conditioning.prompt_embeds[0], encoder.encode(PROMPT)["prompt_embeds"])
    assert torch.equal(conditioning.negative_prompt_embeds[0], encoder.encode(NEGATIVE)["prompt_embeds"])
    assert torch.equal(reader.prompt_embeds("")[1][0], encoder.encode("")["pooled_prompt_embeds"])
    with pytest.raises(UserError, match="'never seen' has not been encoded"):
        reader.prompt_embeds("never seen")
    reader.close()


def batches_of(dataset: TrainingDataset, model: ResolvedModel, dropout: float = 0.0) -> TrainingBatches:
    samples = load_samples([dataset], "train")
    order = BucketBatchSampler(samples, {dataset.dataset_id: 1.0}, seed=3, batch_size=2)
    return TrainingBatches(
        order, reader_of(dataset, model), 0.5, ForwardProcess(TimestepSampler(1000)), dropout
    )


def test_cache_mode_disable_writes_nothing(tmp_path, images, model):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="disable", text_cache="disable")
    before = list_files(tmp_path)
    batches = batches_of(dataset, model, dropout=0.3)
    for index in range(5):
        batches.read(index)
        batches.reader.flush()
    batches.reader.close()
    assert list_files(tmp_path) == before
    assert not (tmp_path / "latents").exists() or not list_files(tmp_path / "latents")


def test_cache_with_all_entries_loads_no_model(tmp_path, images, model, monkeypatch):
    dataset = prepare_dataset(tmp_path, images, model)
    dataset = dataset.model_copy(update={"latent_cache": "ondemand", "text_cache": "disable"})
    monkeypatch.setattr(OnDemandEncoders, "_latent_encoder", None)
    monkeypatch.setattr(OnDemandEncoders, "_caption_encoder", None)
    batches = batches_of(dataset, model, dropout=0.3)
    for index in range(4):
        batches.read(index)


def test_cache_mode_ondemand_writes_full_shards_and_on_flush(tmp_path, images, model, monkeypatch):
    monkeypatch.setattr("sdxl_pipeline.training.data.on_demand_cache.FLUSH_ENTRIES", 2)
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand")
    reader, samples = reader_of(dataset, model), same_bucket(dataset)

    def written() -> int:
        return len(TensorStore(dataset.latents.store_root))

    for sample, expected in zip(samples, (0, 2, 2), strict=True):
        reader.posteriors([sample])
        assert written() == expected
    reader.flush()
    assert written() == 3
    reader.close()


def test_posteriors_changed_image_raises_with_its_path(tmp_path, images, model):
    shutil.copytree(images, tmp_path / "images")
    dataset = prepare_dataset(tmp_path / "dataset", tmp_path / "images", model, latent_cache="ondemand")
    sample = same_bucket(dataset)[1]
    other = next(
        s for s in load_samples([dataset], "train") if s.key != sample.key and s.bucket == sample.bucket
    )
    shutil.copy(images / other.path, tmp_path / "images" / sample.path)
    reader = reader_of(dataset, model)
    with pytest.raises(UserError, match=f"{sample.path}: changed since the dataset was scanned"):
        reader.posteriors(same_bucket(dataset))
    reader.close()
    assert not TensorStore(dataset.latents.store_root).missing([same_bucket(dataset)[0].latent_key])
    (tmp_path / "images" / sample.path).unlink()
    with pytest.raises(UserError, match=f"{sample.path}: cannot be read"):
        reader_of(dataset, model).posteriors([sample])


def test_on_demand_encoding_with_other_precision_raises_and_writes_nothing(tmp_path, images, model):
    """A run config may change the precision of the training alone; writing such entries would corrupt a shared store."""
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand", text_cache="ondemand")
    hardware = HARDWARE.model_copy(update={"vae_dtype": "bf16", "mixed_precision": "bf16"})
    reader = BatchReader([dataset], OnDemandEncoders(model, hardware))
    with pytest.raises(UserError, match="'drawings': vae_latents was planned with another"):
        reader.posteriors(same_bucket(dataset))
    with pytest.raises(UserError, match="text_embeds was planned with another"):
        reader.prompt_embeds(PROMPT)
    reader.close()
    assert not TensorStore(dataset.latents.store_root).keys()


CROPPED = {"crop": True, "crop_aspect": "square", "crop_style": "random"}


def test_fresh_crops_change_at_each_appearance_and_set_time_ids(tmp_path, images, model, latent_encoder):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="disable", fresh_crops=True, **CROPPED)
    before = list_files(tmp_path / "latents")
    batches = batches_of(dataset, model)
    positions_by_key: dict[str, set[tuple[int, int]]] = {}
    for index in range(12):
        batch = batches.read(index)
        for index_in_batch, ref in enumerate(batches.order.batch(index, 0)):
            planned = ref.sample.crop
            top, left = crop_offset(
                "random",
                planned.resized_h - planned.bucket_h,
                planned.resized_w - planned.bucket_w,
                3,
                ref.sample.key,
                f"fresh/{ref.epoch}/{ref.occurrence}/0",
            )
            assert batch.time_ids[index_in_batch, 2:4].tolist() == [top, left]
            crop = Crop(**{**vars(planned), "crop_top": top, "crop_left": left})
            latents = latent_encoder.encode(images / ref.sample.path, crop)
            deviation = (0.5 * latents["logvar"].float()).exp()
            assert (
                (batch.latents[index_in_batch] / 0.5 - latents["mean"].float()).abs() <= 6 * deviation
            ).all()
            positions_by_key.setdefault(ref.sample.key, set()).add((top, left))
    assert len(positions_by_key) == 6
    assert all(len(found) > 1 for found in positions_by_key.values())
    assert list_files(tmp_path / "latents") == before
    again = batches_of(dataset, model).read(7)
    assert torch.equal(again.latents, batches.read(7).latents)
    assert torch.equal(again.time_ids, batches.read(7).time_ids)


def test_batch_may_mix_datasets_of_different_cache_modes(tmp_path, images, model, latent_encoder):
    full = prepare_dataset(tmp_path / "full", images, model)
    lazy = prepare_dataset(
        tmp_path / "lazy", images, model, latent_cache="ondemand", text_cache="disable", id="lazy"
    )
    reader = BatchReader([full, lazy], OnDemandEncoders(model, HARDWARE))
    full_samples, lazy_samples = same_bucket(full), same_bucket(lazy)
    mixed = [lazy_samples[0], full_samples[1], full_samples[0], lazy_samples[2]]
    posteriors = reader.posteriors(mixed)
    texts = reader.text_embeds(mixed, [sample.embed_keys[0] for sample in mixed])
    for position, sample in enumerate(mixed):
        assert torch.equal(posteriors.mean[position], reader.posteriors([sample]).mean[0])
        alone = reader.text_embeds([sample], [sample.embed_keys[0]])
        assert torch.equal(texts.prompt_embeds[position], alone.prompt_embeds[0])
        torch.testing.assert_close(
            posteriors.mean[position],
            encode_file(full, latent_encoder, sample)["mean"].float(),
            rtol=1e-3,
            atol=1e-3,
        )
    reader.close()
