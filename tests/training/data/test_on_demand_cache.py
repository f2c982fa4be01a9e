"""Cache modes: whatever is in the stores and whatever is encoded at first use, position i of a batch is image i, and a run is the run."""

import shutil
from pathlib import Path

import pytest
import torch

from sdxl_pipeline.cache.encode.on_demand_encoders import CaptionEncoder, LatentEncoder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import Crop, fresh_place
from sdxl_pipeline.models.base_model import ResolvedModel, resolve_base_model
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.batches import BatchReader, TrainingBatches
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.on_demand_cache import OnDemandEncoders
from sdxl_pipeline.training.data.samples import Sample, load_samples
from sdxl_pipeline.training.diffusion.forward_process import ForwardProcess, TimestepSampler
from tests.support.encoded_datasets import HARDWARE, generate_validation_images, listing, prepare_dataset
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
    generate_validation_images(folder)
    return folder


def reader_of(dataset: TrainingDataset, model: ResolvedModel) -> BatchReader:
    return BatchReader([dataset], OnDemandEncoders(model, HARDWARE))


def wide(dataset: TrainingDataset) -> list[Sample]:
    """The images of one bucket."""
    samples = list(load_samples([dataset], "train"))
    return [sample for sample in samples if sample.bucket == samples[0].bucket]


def own_latents(dataset: TrainingDataset, encoder: LatentEncoder, sample: Sample) -> dict[str, torch.Tensor]:
    """What the image's file is encoded to, without any reader."""
    return encoder.encode(Path(dataset.data_dir) / sample.path, sample.crop)


def assert_position_is_image(
    dataset: TrainingDataset, encoder: LatentEncoder, reader: BatchReader, samples: list[Sample]
) -> None:
    posteriors = reader.posteriors(samples)
    assert posteriors.keys == tuple(sample.key for sample in samples)
    expected = [own_latents(dataset, encoder, sample) for sample in samples]
    assert not torch.equal(expected[0]["mean"], expected[1]["mean"]), "a reversed batch would not be seen"
    for place, own in enumerate(expected):
        torch.testing.assert_close(posteriors.mean[place], own["mean"].float(), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(posteriors.logvar[place], own["logvar"].float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", *DEFERRED])
def test_position_i_of_the_latents_is_image_i(tmp_path, images, model, latent_encoder, mode):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache=mode)
    samples = wide(dataset)
    reader = reader_of(dataset, model)
    assert len(samples) == 3
    assert_position_is_image(
        dataset, latent_encoder, reader, samples
    )  # none of them is there but in full mode
    assert_position_is_image(dataset, latent_encoder, reader, samples[::-1])
    reader.close()
    assert_position_is_image(
        dataset, latent_encoder, reader_of(dataset, model), [samples[2], samples[0], samples[1]]
    )


@pytest.mark.parametrize("present", [[0], [1], [2], [0, 2]])
def test_position_i_is_image_i_when_some_are_in_the_store(tmp_path, images, model, latent_encoder, present):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand")
    samples = wide(dataset)
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
def test_position_i_of_the_texts_is_the_caption_of_image_i(tmp_path, images, model, caption_encoder, mode):
    dataset = prepare_dataset(tmp_path, images, model, text_cache=mode)
    samples = list(load_samples([dataset], "train"))
    reader, encoder = reader_of(dataset, model), caption_encoder
    for order in (samples[:3], samples[::-1], [samples[1], samples[4], samples[0], samples[1]]):
        texts = reader.text_embeds(order, [sample.embed_keys[0] for sample in order])
        for place, sample in enumerate(order):
            caption = (images / sample.path).with_suffix(".txt").read_text().strip()
            own = encoder.encode(caption)
            torch.testing.assert_close(texts.prompt_embeds[place], own["prompt_embeds"], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(
                texts.pooled_prompt_embeds[place], own["pooled_prompt_embeds"], rtol=1e-3, atol=1e-3
            )
    reader.close()
    written = len(TensorStore(dataset.text_embeds.store_root))
    assert written == {"full": 9, "ondemand": 6, "disable": 0}[mode]


@pytest.mark.parametrize("mode", DEFERRED)
def test_prompts_are_had_in_every_mode(tmp_path, images, model, caption_encoder, mode):
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


def test_disable_touches_no_store(tmp_path, images, model):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="disable", text_cache="disable")
    before = listing(tmp_path)
    batches = batches_of(dataset, model, dropout=0.3)
    for index in range(5):
        batches.read(index)
        batches.reader.flush()
    batches.reader.close()
    assert listing(tmp_path) == before
    assert not (tmp_path / "latents").exists() or not listing(tmp_path / "latents")


def test_no_model_is_loaded_while_everything_is_there(tmp_path, images, model, monkeypatch):
    dataset = prepare_dataset(tmp_path, images, model)
    dataset = dataset.model_copy(update={"latent_cache": "ondemand", "text_cache": "disable"})
    monkeypatch.setattr(OnDemandEncoders, "_latent_encoder", None)
    monkeypatch.setattr(OnDemandEncoders, "_caption_encoder", None)
    batches = batches_of(dataset, model, dropout=0.3)
    for index in range(4):
        batches.read(index)


def test_what_was_encoded_is_written_a_shard_at_a_time_and_when_asked(tmp_path, images, model, monkeypatch):
    monkeypatch.setattr("sdxl_pipeline.training.data.on_demand_cache.WRITTEN_TOGETHER", 2)
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand")
    reader, samples = reader_of(dataset, model), wide(dataset)

    def written() -> int:
        return len(TensorStore(dataset.latents.store_root))

    for sample, expected in zip(samples, (0, 2, 2), strict=True):
        reader.posteriors([sample])
        assert written() == expected
    reader.flush()
    assert written() == 3
    reader.close()


def test_a_image_that_changed_is_an_error_that_names_it(tmp_path, images, model):
    shutil.copytree(images, tmp_path / "images")
    dataset = prepare_dataset(tmp_path / "dataset", tmp_path / "images", model, latent_cache="ondemand")
    sample = wide(dataset)[1]
    other = next(
        s for s in load_samples([dataset], "train") if s.key != sample.key and s.bucket == sample.bucket
    )
    shutil.copy(images / other.path, tmp_path / "images" / sample.path)
    reader = reader_of(dataset, model)
    with pytest.raises(UserError, match=f"{sample.path}: changed since the dataset was scanned"):
        reader.posteriors(wide(dataset))
    reader.close()
    assert not TensorStore(dataset.latents.store_root).missing([wide(dataset)[0].latent_key])
    (tmp_path / "images" / sample.path).unlink()
    with pytest.raises(UserError, match=f"{sample.path}: cannot be read"):
        reader_of(dataset, model).posteriors([sample])


def test_nothing_is_written_under_a_name_it_does_not_stand_for(tmp_path, images, model):
    """As when the launchpad changes a precision for the training alone: the store would be wrong for all who share it."""
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="ondemand", text_cache="ondemand")
    hardware = HARDWARE.model_copy(update={"vae_dtype": "bf16", "mixed_precision": "bf16"})
    reader = BatchReader([dataset], OnDemandEncoders(model, hardware))
    with pytest.raises(UserError, match="'drawings': vae_latents was planned with another"):
        reader.posteriors(wide(dataset))
    with pytest.raises(UserError, match="text_embeds was planned with another"):
        reader.prompt_embeds(PROMPT)
    reader.close()
    assert not TensorStore(dataset.latents.store_root).keys()


CROPPED = {"crop": True, "crop_aspect": "square", "crop_style": "random"}


def test_fresh_crops_are_cut_anew_each_time_and_say_where(tmp_path, images, model, latent_encoder):
    dataset = prepare_dataset(tmp_path, images, model, latent_cache="disable", fresh_crops=True, **CROPPED)
    before = listing(tmp_path / "latents")
    batches = batches_of(dataset, model)
    places: dict[str, set[tuple[int, int]]] = {}
    for index in range(12):
        batch = batches.read(index)
        for place, draw in enumerate(batches.order.batch(index, 0)):
            planned = draw.sample.crop
            top, left = fresh_place(
                "random",
                planned.resized_h - planned.bucket_h,
                planned.resized_w - planned.bucket_w,
                3,
                draw.sample.key,
                f"fresh/{draw.epoch}/{draw.occurrence}/0",
            )
            assert batch.time_ids[place, 2:4].tolist() == [top, left]
            crop = Crop(**{**vars(planned), "crop_top": top, "crop_left": left})
            own = latent_encoder.encode(images / draw.sample.path, crop)
            deviation = (0.5 * own["logvar"].float()).exp()
            assert ((batch.latents[place] / 0.5 - own["mean"].float()).abs() <= 6 * deviation).all()
            places.setdefault(draw.sample.key, set()).add((top, left))
    assert len(places) == 6
    assert all(len(found) > 1 for found in places.values())
    assert listing(tmp_path / "latents") == before
    again = batches_of(dataset, model).read(7)
    assert torch.equal(again.latents, batches.read(7).latents)
    assert torch.equal(again.time_ids, batches.read(7).time_ids)


def test_datasets_of_different_modes_meet_in_one_batch(tmp_path, images, model, latent_encoder):
    full = prepare_dataset(tmp_path / "full", images, model)
    lazy = prepare_dataset(
        tmp_path / "lazy", images, model, latent_cache="ondemand", text_cache="disable", id="lazy"
    )
    reader = BatchReader([full, lazy], OnDemandEncoders(model, HARDWARE))
    ours, theirs = wide(full), wide(lazy)
    mixed = [theirs[0], ours[1], ours[0], theirs[2]]
    posteriors = reader.posteriors(mixed)
    texts = reader.text_embeds(mixed, [sample.embed_keys[0] for sample in mixed])
    for place, sample in enumerate(mixed):
        assert torch.equal(posteriors.mean[place], reader.posteriors([sample]).mean[0])
        alone = reader.text_embeds([sample], [sample.embed_keys[0]])
        assert torch.equal(texts.prompt_embeds[place], alone.prompt_embeds[0])
        torch.testing.assert_close(
            posteriors.mean[place],
            own_latents(full, latent_encoder, sample)["mean"].float(),
            rtol=1e-3,
            atol=1e-3,
        )
    reader.close()
