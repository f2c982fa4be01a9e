"""Training on real images through all stages before it, with every cache mode, file name and corrupt entry."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.runtime.specs import FailedItem, TrainedLora, TrainingDataset, TrainSpec
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages.train import main
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
from sdxl_pipeline.training.data.batches import BatchReader
from sdxl_pipeline.training.data.bucket_sampler import BucketBatchSampler
from sdxl_pipeline.training.data.samples import load_samples
from tests.support.encoded_datasets import (
    SilentReporter,
    list_files,
    prepare_dataset,
    read_crop_plan,
    write_images,
)
from tests.support.train_programs import StoppingReporter
from tests.support.training_datasets import make_dataset, make_spec

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 5
SETTINGS = {
    "max_train_steps": STEPS,
    "checkpoint_step_interval": 2,
    "caption_dropout_probability": 0.3,
    "lr_warmup_steps": 0,
}
WITH_IMAGES = {"validation_disable": False, "validation_step_interval": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return folder


def spec_of(folder: Path, *datasets: TrainingDataset, run: str = "run", **settings: object) -> TrainSpec:
    folder.mkdir(parents=True, exist_ok=True)
    return make_spec(folder, *datasets, run=run, **{**SETTINGS, **settings})


def spec_in_mode(folder: Path, images: Path, mode: str, **settings: object) -> TrainSpec:
    spec = spec_of(folder, **settings)
    dataset = prepare_dataset(
        folder / "drawings", images, spec.base_model, latent_cache=mode, text_cache=mode
    )
    return spec.model_copy(update={"datasets": (dataset,)})


def train(spec: TrainSpec) -> TrainedLora:
    return main(spec, SilentReporter(), StopSignal())


def assert_weights_close(actual: TrainedLora, expected: TrainedLora) -> None:
    """Allow for rounding: an image encoded alone differs from one encoded in a batch, by an amount that depends on the processor."""
    tensors = load_file(expected.weights_path)
    for name, tensor in load_file(actual.weights_path).items():
        assert (tensor - tensors[name]).norm() <= 1e-2 * tensors[name].norm(), name


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[TrainSpec, TrainedLora]:
    spec = spec_in_mode(tmp_path_factory.mktemp("full"), images, "full", **WITH_IMAGES)
    return spec, train(spec)


@pytest.fixture(scope="module")
def ondemand(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[TrainSpec, TrainedLora]:
    spec = spec_in_mode(tmp_path_factory.mktemp("ondemand"), images, "ondemand", **WITH_IMAGES)
    return spec, train(spec)


def test_train_every_cache_mode_has_same_identity_and_weights(full, ondemand, tmp_path, images):
    full_spec, cached = full
    spec = spec_in_mode(tmp_path, images, "disable", **WITH_IMAGES)
    stores = [tmp_path / "drawings" / name for name in ("latents", "texts")]
    before = [list_files(store) for store in stores]
    uncached = train(spec)
    assert [list_files(store) for store in stores] == before
    assert cached.identity == ondemand[1].identity == uncached.identity == run_identity(full_spec)
    assert uncached.weights_sha256 == ondemand[1].weights_sha256
    assert_weights_close(uncached, cached)
    dataset = ondemand[0].datasets[0]
    latent_keys = {sample.latent_key for sample in load_samples([dataset], "train")}
    assert not TensorStore(dataset.latents.store_root).missing(latent_keys)
    assert (
        len({Path(image.path).read_bytes() for run in (cached, uncached) for image in run.validation_images})
        <= 2
    )
    assert len(uncached.validation_images) == 1


@pytest.mark.slow
def test_train_ondemand_stopped_and_resumed_has_same_weights(ondemand, tmp_path, images):
    spec = spec_in_mode(tmp_path, images, "ondemand")
    stop = StopSignal()

    with pytest.raises(StageStopped):
        main(spec, StoppingReporter(stop, 3), stop)
    resumed = train(spec)
    assert resumed.resumed_from_step == 3
    assert resumed.weights_sha256 == ondemand[1].weights_sha256


def test_run_identity_changes_with_fresh_crops(full, tmp_path, images):
    spec, _ = full
    fresh = spec.datasets[0].model_copy(update={"latent_cache": "disable", "fresh_crops": True})
    assert run_identity(spec.model_copy(update={"datasets": (fresh,)})) != run_identity(spec)


def test_train_renamed_files_have_same_identity_and_weights(full, tmp_path, images):
    """The same images have other names and folders and are found in another order."""
    spec, trained = full
    moved = tmp_path / "moved"
    for number, path in enumerate(sorted(images.glob("*.png"), reverse=True)):
        target = moved / f"folder {number % 2}" / f"{number:02d} renamed.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        shutil.copy(path.with_suffix(".txt"), target.with_suffix(".txt"))
    dataset = prepare_dataset(tmp_path / "drawings", moved, spec.base_model)
    before, after = (load_samples(datasets, "train") for datasets in (spec.datasets, (dataset,)))
    assert {sample.path for sample in before}.isdisjoint(sample.path for sample in after)
    assert after.digest() == before.digest()
    assert [sample.id for sample in after] == [sample.id for sample in before]
    expected, actual = (BucketBatchSampler(samples, {"drawings": 1.0}, 42, 2) for samples in (before, after))
    for index in range(12):
        refs = [
            [(ref.sample.id, ref.embed_key) for ref in sampler.batch(index, 0)]
            for sampler in (expected, actual)
        ]
        assert refs[0] == refs[1]
    renamed = spec_of(tmp_path, dataset)
    assert run_identity(renamed) == trained.identity
    assert train(renamed).weights_sha256 == trained.weights_sha256


def test_load_samples_copies_of_image_are_distinguished_by_caption(tmp_path, images):
    spec = spec_of(tmp_path / "spec")
    captions = ("a drawing, number 0, of an ellipse", "another caption")
    loaded = []
    for number, names in enumerate((("a", "x"), ("y", "b"))):  # in the order of their captions, and reversed
        folder = shutil.copytree(images, tmp_path / f"images {number}")
        for name, caption in zip(names, captions, strict=True):
            shutil.copy(folder / "image_0.png", folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(caption)
        (folder / "image_0.png").unlink()
        (folder / "image_0.txt").unlink()
        dataset = prepare_dataset(tmp_path / f"dataset {number}", folder, spec.base_model)
        loaded.append(load_samples([dataset], "train"))
    one, other = loaded
    assert len({sample.id for sample in one}) == len(one) == 7
    assert len({sample.key for sample in one}) == 6
    assert one.digest() == other.digest()
    assert [(s.id, s.embed_keys) for s in one] == [(s.id, s.embed_keys) for s in other]


@pytest.mark.slow
def test_train_two_resolutions_of_one_folder_share_held_out_images(tmp_path):
    images = tmp_path / "images"
    write_images(images, count=10)  # none is held out of fewer than 8
    spec = spec_of(tmp_path, train_batch_size=1, max_train_steps=3)
    datasets = tuple(
        prepare_dataset(tmp_path / name, images, spec.base_model, holdout=0.4, id=name, resolution=resolution)
        for name, resolution in (("small", 48), ("large", 80))
    )
    trained, held_out = (load_samples(datasets, split) for split in ("train", "eval"))
    assert set(trained.images_by_dataset()) == {"small", "large"}
    assert {s.key for s in trained}.isdisjoint({s.key for s in held_out})
    for samples in (trained, held_out):
        keys = [{s.key for s in samples if s.dataset_id == name} for name in ("small", "large")]
        assert keys[0] == keys[1]
        assert keys[0]
    assert len({s.latent_key for s in trained}) == len(trained)
    assert all(read_crop_plan(dataset)["split"].value_counts().min() > 0 for dataset in datasets)
    sampler = BucketBatchSampler(trained, {"small": 1.0, "large": 1.0}, 42, 1)
    sampled = [sampler.batch(index, 0)[0].sample.dataset_id for index in range(sampler.batches_until(1))]
    assert sorted(sampled) == sorted(s.dataset_id for s in trained)
    assert train(spec.model_copy(update={"datasets": datasets})).steps == 3


def test_train_manifest_counts_trained_and_held_out_images(tmp_path, images):
    """Scanned images without latents and several crops of an image are not counted; eval datasets count as held out."""
    splits = {"a.png": "train", "b.png": "train", "c.png": "eval", "d.png": "train"}
    mixed = make_dataset(tmp_path / "mixed", "mixed", splits=splits, crops=2)
    latents = pd.read_parquet(mixed.latents.entries_path)
    latents[latents["path"] != "d.png"].to_parquet(mixed.latents.entries_path)
    failed = mixed.latents.model_copy(update={"failed": (FailedItem(name="d.png", reason="damaged"),)})
    mixed = mixed.model_copy(update={"latents": failed, "repeats": 3})
    evaluated = make_dataset(tmp_path / "evaluated", "evaluated", splits=["eval"] * 5)
    result = train(make_spec(tmp_path, mixed, evaluated, max_train_steps=2))
    assert result.trained_images == {"mixed": 2}
    assert result.held_out_images == {"evaluated": 5, "mixed": 1}


def test_train_two_text_windows_trains_and_generates_images(tmp_path, images):
    spec = spec_of(tmp_path, **WITH_IMAGES)
    dataset = prepare_dataset(tmp_path / "drawings", images, spec.base_model, windows=2)
    reader = BatchReader([dataset])
    samples = list(load_samples([dataset], "train"))[:2]
    texts = reader.text_embeds(samples, [sample.embed_keys[0] for sample in samples])
    assert texts.prompt_embeds.shape == (2, 154, 128)
    assert reader.prompt_embeds("")[0].shape == (1, 154, 128)
    result = train(spec.model_copy(update={"datasets": (dataset,)}))
    assert result.steps == STEPS
    assert len(result.validation_images) == 1


def test_train_too_small_dataset_raises_unless_oversubscription_is_allowed(tmp_path, images):
    spec = spec_of(tmp_path, train_batch_size=4, gradient_accumulation_steps=4, max_train_steps=1)
    dataset = prepare_dataset(tmp_path / "drawings", images, spec.base_model)
    with pytest.raises(UserError, match="give 6 images an epoch, but one step takes 16"):
        train(spec.model_copy(update={"datasets": (dataset,)}))
    settings = spec.settings.model_copy(update={"allow_dataset_oversubscription": True})
    result = train(spec.model_copy(update={"datasets": (dataset,), "settings": settings}))
    assert result.steps == 1
    assert result.raised_repeats == {"drawings": 2}
    assert result.images_per_epoch == {"drawings": 18.0}


def flip_last_byte(folder: Path) -> None:
    shard = max((folder / "shards").iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_train_corrupt_entries_raise_with_names_and_are_encoded_again(tmp_path, images, full):
    spec = spec_in_mode(tmp_path, images, "full", **WITH_IMAGES)
    for store in ("latents", "texts"):
        flip_last_byte(tmp_path / "drawings" / store)
    with pytest.raises(UserError) as raised:
        train(spec)
    message = str(raised.value)
    assert "checksum did not match" in message
    assert "vae_latents of 'image_" in message  # both are reported at once, by the names of their images
    assert "text_embeds of 'a red circle'" in message  # the last entry that the text stage writes is a prompt
    dataset = prepare_dataset(tmp_path / "drawings", images, spec.base_model)
    assert (dataset.latents.encoded, dataset.latents.reused) == (1, 5)
    assert dataset.text_embeds.encoded == 1
    trained = train(spec.model_copy(update={"datasets": (dataset,)}))
    assert_weights_close(trained, full[1])


def test_train_ondemand_corrupt_entries_are_encoded_again(tmp_path, images, full, caplog):
    spec = spec_in_mode(tmp_path, images, "ondemand", **WITH_IMAGES)
    train(spec)
    flip_last_byte(tmp_path / "drawings" / "latents")
    again = train(spec.model_copy(update={"run_dir": str(tmp_path / "again")}))
    assert "1 corrupt entries are removed" in caplog.text
    assert_weights_close(again, full[1])
    assert TensorStore(tmp_path / "drawings" / "latents").corrupt_keys() == []
