"""Loss masks: all-white masks change nothing, black areas have no loss, and masks are cropped and batched with their image."""

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.data.masks.mask_pairs import mask_crop
from sdxl_pipeline.runtime.specs import TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
from sdxl_pipeline.training.data import loss_masks
from sdxl_pipeline.training.data.loss_masks import LossWeights, MaskReader, build_loss_weights
from sdxl_pipeline.training.data.mask_tables import mask_tables
from sdxl_pipeline.training.data.samples import Sample, load_samples
from sdxl_pipeline.training.diffusion.objective import Objective
from tests.support.masked_datasets import masked_dataset
from tests.support.training_datasets import SQUARE, make_dataset, make_spec

SEED = 5


def square_samples(dataset: TrainingDataset) -> list[Sample]:
    return [sample for sample in load_samples([dataset], "train") if sample.bucket == SQUARE]


def weights_of(dataset: TrainingDataset) -> LossWeights:
    return build_loss_weights([dataset], MaskSettings(), use_base_prediction=True)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset", crops=2)


def test_for_batch_masked_images_returns_masks_cropped_like_the_images(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = square_samples(masked)
    assert any(sample.crop.flipped for sample in samples)
    read = weights_of(masked).for_batch(samples, SEED, 0, range(len(samples)))
    assert read.keys == tuple(sample.key for sample in samples)
    for sample, weights in zip(samples, read.weights, strict=True):
        mask = tmp_path / "masks" / f"{Path(sample.path).stem}.png"
        assert torch.equal(weights[0], torch.from_numpy(mask_crop(mask, sample.crop, "mask")))
        assert 0 < weights.mean() < 1


def test_for_batch_image_without_mask_has_weight_one(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks", images=[0])
    samples = square_samples(masked)
    read = weights_of(masked).for_batch(samples, SEED, 0, range(len(samples)))
    is_unmasked = [bool((weights == 1).all()) for weights in read.weights]
    assert is_unmasked == [not sample.path.endswith("00.png") for sample in samples]


def test_for_batch_mask_probability_is_applied_by_slot(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    sample = square_samples(masked)[0]
    weights = LossWeights(MaskReader(mask_tables([masked])), mask_probability=0.3)

    def unmasked(index: int, slots: range) -> list[bool]:
        read = weights.for_batch([sample] * len(slots), SEED, index, slots)
        return [bool((each == 1).all()) for each in read.weights]

    by_batch = [unmasked(index, range(4)) for index in range(100)]
    assert abs(sum(map(sum, by_batch)) / 400 - 0.7) < 0.06
    assert by_batch[7] == unmasked(7, range(2)) + unmasked(7, range(2, 4))


def test_mask_reader_repeated_reads_use_a_bounded_cache(dataset, tmp_path, monkeypatch):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = square_samples(masked)
    reads = []

    def count_read(table, path, key, crop):
        reads.append(path)
        return torch.ones(1, 8, 8)

    monkeypatch.setattr(loss_masks, "_read_crop", count_read)
    reader = MaskReader(mask_tables([masked]))
    for _ in range(3):
        reader.read(samples, [True] * len(samples))
    assert len(reads) == len(samples)
    monkeypatch.setattr(loss_masks, "MASK_CACHE_BYTES", 2 * 8 * 8 * 4)
    reads.clear()
    small = MaskReader(mask_tables([masked]))
    for sample in (samples[0], samples[1], samples[2], samples[2], samples[1], samples[0]):
        small.read([sample], [True])
    assert len(reads) == 4  # the first one was evicted


def test_mask_reader_changed_or_missing_file_raises_with_its_path(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = square_samples(masked)[:1]
    path = tmp_path / "masks" / f"{Path(samples[0].path).stem}.png"
    Image.new("L", (30, 30)).save(path)
    with pytest.raises(UserError, match=r"image_00.png: changed since.*materialize"):
        MaskReader(mask_tables([masked])).read(samples, [True])
    path.unlink()
    with pytest.raises(UserError, match=r"image_00.png: cannot be read"):
        MaskReader(mask_tables([masked])).read(samples, [True])


def test_run_identity_changes_with_mask_content_but_not_with_its_path(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    before = run_identity(make_spec(tmp_path, masked))
    assert before != run_identity(make_spec(tmp_path, dataset))
    moved = masked_dataset(dataset, tmp_path / "moved" / "masks")
    assert run_identity(make_spec(tmp_path, moved)) == before
    segmentation = masked.masks.model_copy(update={"kind": "segmentation"})
    other = masked.model_copy(update={"masks": segmentation})
    assert run_identity(make_spec(tmp_path, other)) != before

    pairs = pd.read_parquet(moved.masks.pairs_path)
    pairs.loc[1, "mask_key"] = "0" * 64
    pairs.to_parquet(moved.masks.pairs_path)
    assert run_identity(make_spec(tmp_path, moved)) != before
    latents = [[sample.latent_key for sample in load_samples([each], "train")] for each in (dataset, moved)]
    assert latents[0] == latents[1]


def test_run_identity_changes_with_regularisation(tmp_path, dataset):
    plain = run_identity(make_spec(tmp_path, dataset))
    prior = dataset.model_copy(update={"is_regularisation": True})
    assert run_identity(make_spec(tmp_path, prior)) != plain


def losses(objective: Objective, prediction: torch.Tensor, latents, noise, timesteps, weights=None):
    target = objective.loss_target(latents, noise, timesteps)
    errors = objective.elementwise_loss(
        objective.to_loss_space(prediction, noise, timesteps), target, timesteps
    )
    return objective.per_sample_loss(errors if weights is None else errors * weights, timesteps)


@pytest.fixture
def loss_inputs():
    torch.manual_seed(3)
    objective = Objective(torch.linspace(0.999, 0.005, 1000), "epsilon")
    latents, noise, prediction = (torch.randn(3, 4, 8, 8) for _ in range(3))
    return objective, prediction.requires_grad_(), latents, noise, torch.tensor([10, 500, 900])


def test_loss_with_white_mask_is_unchanged_bit_for_bit(loss_inputs):
    assert torch.equal(losses(*loss_inputs, torch.ones(3, 1, 8, 8)), losses(*loss_inputs))


def test_loss_in_black_area_is_zero_and_has_no_gradient(loss_inputs):
    objective, prediction, latents, noise, timesteps = loss_inputs
    weights = torch.ones(3, 1, 8, 8)
    weights[1, :, :4] = 0
    before = losses(*loss_inputs, weights)
    (gradient,) = torch.autograd.grad(before.sum(), prediction)
    assert (gradient[1, :, :4] == 0).all()
    assert (gradient[1, :, 4:] != 0).all()
    other = noise.clone()
    other[1, :, :4] += 7.0  # the target under the black area
    assert torch.equal(losses(objective, prediction, latents, other, timesteps, weights), before)
    # the mean is over all positions, black ones too, as in SimpleTuner
    error = (prediction - noise)[1, :, 4:].square().sum() / (4 * 8 * 8)
    torch.testing.assert_close(before[1], error, rtol=1e-6, atol=0)
