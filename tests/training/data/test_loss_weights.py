"""Holds: white masks change no bit, black places cost nothing, and masks reach a batch with their image, cut as it was."""

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.data.masks.mask_pairs import mask_crop
from sdxl_pipeline.runtime.specs import DatasetMasks, TrainingDataset
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_identity import run_identity
from sdxl_pipeline.training.data import loss_masks
from sdxl_pipeline.training.data.loss_masks import MaskReader
from sdxl_pipeline.training.data.loss_weights import LossWeights, build_loss_weights
from sdxl_pipeline.training.data.mask_tables import mask_tables
from sdxl_pipeline.training.data.samples import Sample, load_samples
from sdxl_pipeline.training.diffusion.objective import Objective
from tests.support.training_datasets import SQUARE, make_dataset, make_spec

SEED = 5


def masked_dataset(
    dataset: TrainingDataset, folder: Path, images: Sequence[int] | None = None
) -> TrainingDataset:
    """The dataset with a mask for its images of these numbers, or all: random grey, another one for each."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = []
    rows = pd.read_parquet(dataset.rows_path).drop_duplicates("path")
    for number, row in enumerate(rows.itertuples()):
        if images is not None and number not in images:
            continue
        random = np.random.default_rng(number)
        values = random.integers(0, 255, (row.original_h // 4, row.original_w // 4), dtype=np.uint8)
        path = folder / f"{Path(row.path).stem}.png"
        Image.fromarray(values).save(path)
        key = sha256(path.read_bytes()).hexdigest()
        pairs.append({"path": row.path, "key": row.key, "mask_path": path.name, "mask_key": key})
    table = folder / "pairs.parquet"
    pd.DataFrame(pairs).to_parquet(table)
    dataset_masks = DatasetMasks(kind="mask", data_dir=str(folder), pairs_path=str(table))
    return dataset.model_copy(update={"masks": dataset_masks})


def samples_of(dataset: TrainingDataset) -> list[Sample]:
    return [sample for sample in load_samples([dataset], "train") if sample.bucket == SQUARE]


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "dataset", crops=2)


def test_each_mask_is_cut_as_its_image_and_travels_with_its_key(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = samples_of(masked)
    assert any(sample.crop.flipped for sample in samples)
    read = build_loss_weights(make_spec(tmp_path, masked)).of(samples, SEED, 0, range(len(samples)))
    assert read.keys == tuple(sample.key for sample in samples)
    for sample, weights in zip(samples, read.weights, strict=True):
        mask = tmp_path / "masks" / f"{Path(sample.path).stem}.png"
        assert torch.equal(weights[0], torch.from_numpy(mask_crop(mask, sample.crop, "mask")))
        assert 0 < weights.mean() < 1


def test_images_without_a_mask_count_whole(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks", images=[0])
    samples = samples_of(masked)
    read = build_loss_weights(make_spec(tmp_path, masked)).of(samples, SEED, 0, range(len(samples)))
    whole = [bool((weights == 1).all()) for weights in read.weights]
    assert whole == [not sample.path.endswith("00.png") for sample in samples]


def test_the_asked_share_of_appearances_is_masked_by_slot_alone(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    sample = samples_of(masked)[0]
    weights = LossWeights(MaskReader(mask_tables([masked])), masked_share=0.3)

    def whole(index: int, slots: range) -> list[bool]:
        read = weights.of([sample] * len(slots), SEED, index, slots)
        return [bool((each == 1).all()) for each in read.weights]

    drawn = [whole(index, range(4)) for index in range(100)]
    assert abs(sum(map(sum, drawn)) / 400 - 0.7) < 0.06
    assert drawn[7] == whole(7, range(2)) + whole(7, range(2, 4))


def test_a_mask_in_memory_is_not_read_again_and_memory_is_bounded(dataset, tmp_path, monkeypatch):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = samples_of(masked)
    reads = []

    def counted(table, path, key, crop):
        reads.append(path)
        return torch.ones(1, 8, 8)

    monkeypatch.setattr(loss_masks, "_cut", counted)
    reader = MaskReader(mask_tables([masked]))
    for _ in range(3):
        reader.read(samples, [True] * len(samples))
    assert len(reads) == len(samples)
    monkeypatch.setattr(loss_masks, "REMEMBERED_BYTES", 2 * 8 * 8 * 4)
    reads.clear()
    small = MaskReader(mask_tables([masked]))
    for sample in (samples[0], samples[1], samples[2], samples[2], samples[1], samples[0]):
        small.read([sample], [True])
    assert len(reads) == 4  # the first one had to make room


def test_a_mask_that_has_changed_or_gone_stops_with_its_name(dataset, tmp_path):
    masked = masked_dataset(dataset, tmp_path / "masks")
    samples = samples_of(masked)[:1]
    path = tmp_path / "masks" / f"{Path(samples[0].path).stem}.png"
    Image.new("L", (30, 30)).save(path)
    with pytest.raises(UserError, match=r"image_00.png: changed since.*materialize"):
        MaskReader(mask_tables([masked])).read(samples, [True])
    path.unlink()
    with pytest.raises(UserError, match=r"image_00.png: cannot be read"):
        MaskReader(mask_tables([masked])).read(samples, [True])


def test_an_edited_mask_is_another_run_with_the_same_latents(dataset, tmp_path):
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


def test_regularisation_is_another_run(tmp_path, dataset):
    plain = run_identity(make_spec(tmp_path, dataset))
    prior = dataset.model_copy(update={"is_regularisation": True})
    assert run_identity(make_spec(tmp_path, prior)) != plain


def losses(objective: Objective, prediction: torch.Tensor, latents, noise, timesteps, weights=None):
    wanted = objective.target(latents, noise, timesteps)
    errors = objective.elementwise_loss(
        objective.to_loss_space(prediction, noise, timesteps), wanted, timesteps
    )
    return objective.per_sample_loss(errors if weights is None else errors * weights, timesteps)


@pytest.fixture
def pieces():
    torch.manual_seed(3)
    objective = Objective(torch.linspace(0.999, 0.005, 1000), "epsilon")
    latents, noise, prediction = (torch.randn(3, 4, 8, 8) for _ in range(3))
    return objective, prediction.requires_grad_(), latents, noise, torch.tensor([10, 500, 900])


def test_a_white_mask_changes_no_bit(pieces):
    assert torch.equal(losses(*pieces, torch.ones(3, 1, 8, 8)), losses(*pieces))


def test_black_places_cost_nothing_and_give_no_gradient(pieces):
    objective, prediction, latents, noise, timesteps = pieces
    weights = torch.ones(3, 1, 8, 8)
    weights[1, :, :4] = 0
    before = losses(*pieces, weights)
    (gradient,) = torch.autograd.grad(before.sum(), prediction)
    assert (gradient[1, :, :4] == 0).all()
    assert (gradient[1, :, 4:] != 0).all()
    other = noise.clone()
    other[1, :, :4] += 7.0  # what there is to predict under the black part
    assert torch.equal(losses(objective, prediction, latents, other, timesteps, weights), before)
    # a mean over all places, black ones too, as the reference takes it
    error = (prediction - noise)[1, :, 4:].square().sum() / (4 * 8 * 8)
    torch.testing.assert_close(before[1], error, rtol=1e-6, atol=0)
