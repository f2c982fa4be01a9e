"""Samples: crop plan, latents and captions joined by image, with SDXL's size conditioning; missing entries are errors."""

from pathlib import Path

import pandas as pd
import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.runtime.specs import FailedItem
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.data.training_plan import PlannedDataset, plan_training
from tests.support.training_datasets import SQUARE, WIDE, by_path, digest, make_dataset

RECORDED_DIGEST = "458de265d4b3b1c06d91928c1c1baba690ec9d8be9da3bc738d74ccda793873f"
"""Of `make_dataset`, by the code before the modules were laid out by subject."""


def test_load_samples_joins_plan_latents_and_captions(tmp_path):
    dataset = make_dataset(tmp_path, captions=2)
    sample = by_path(load_samples([dataset], "train"))["image_04.png"]
    key = digest("image", "shapes", 4)
    assert (sample.path, sample.key, sample.bucket) == ("image_04.png", key, WIDE)
    assert sample.latent_key == digest("latent", key)
    assert sample.embed_keys == (
        digest("text", "caption", "shapes 4 0"),
        digest("text", "caption", "shapes 4 1"),
    )
    # original 204x288, cropped from (0, 0), to 64x96 (height first)
    assert sample.time_ids == (204, 288, 0, 0, 64, 96)


def test_load_samples_micro_conditioning_resized_uses_resized_size(tmp_path):
    sample = by_path(load_samples([make_dataset(tmp_path)], "train", "resized"))["image_01.png"]
    assert sample.time_ids == (68, 64, 1, 0, 64, 64)


def test_load_samples_separates_splits_and_datasets(tmp_path):
    datasets = [
        make_dataset(tmp_path / "a", "a", splits=["train", "eval", "train", "eval", "eval"]),
        make_dataset(tmp_path / "b", "b", buckets=[SQUARE]),
    ]
    assert {s.id for s in load_samples(datasets, "train")} == {
        f"a/{digest('image', 'a', 0)}#0",
        f"a/{digest('image', 'a', 2)}#0",
        f"b/{digest('image', 'b', 0)}#0",
    }
    assert {s.path for s in load_samples(datasets, "eval")} == {
        "image_01.png",
        "image_03.png",
        "image_04.png",
    }


def test_load_samples_held_out_image_is_excluded_from_all_datasets(tmp_path):
    holds_out = make_dataset(tmp_path / "a", "a", splits=["train", "eval", "train", "train", "train"])
    same_files = make_dataset(tmp_path / "b", "a").model_copy(update={"dataset_id": "b"})
    datasets = [holds_out, same_files]
    assert load_samples(datasets, "train").images_by_dataset() == {"a": 4, "b": 4}
    assert digest("image", "a", 1) not in load_samples(datasets, "train").keys_by_dataset()["b"]
    assert [sample.id for sample in load_samples(datasets, "eval")] == [f"a/{digest('image', 'a', 1)}#0"]

    rows = [pd.read_parquet(dataset.rows_path) for dataset in datasets]
    planned = [PlannedDataset(name, table, 0, 1.0) for name, table in zip("ab", rows, strict=True)]
    settings = TrainingSettings(pretrained_model_name_or_path="model", max_train_steps=2, train_batch_size=2)
    plan = plan_training(planned, settings, 1, allow_oversubscription=False)
    assert (plan.trained_images, plan.held_out_images) == ({"a": 4, "b": 4}, {"a": 1})


def test_load_samples_eval_dataset_excludes_no_training_images(tmp_path):
    eval_dataset = make_dataset(tmp_path / "a", "a", splits=["eval"] * 5)
    trained = make_dataset(tmp_path / "b", "a").model_copy(update={"dataset_id": "b"})
    assert load_samples([eval_dataset, trained], "train").images_by_dataset() == {"b": 5}


def edit(path: str, change) -> None:
    change(pd.read_parquet(path)).to_parquet(path)


def test_load_samples_failed_image_is_skipped_and_missing_latent_raises(tmp_path):
    dataset = make_dataset(tmp_path)
    edit(dataset.latents.entries_path, lambda table: table[table["path"] != "image_02.png"])
    with pytest.raises(UserError, match=r"'shapes': 1 images .* no latent \(image_02.png\)"):
        load_samples([dataset], "train")
    failed = (FailedItem(name="image_02.png", reason="NaN"),)
    reported = dataset.model_copy(update={"latents": dataset.latents.model_copy(update={"failed": failed})})
    assert list(by_path(load_samples([reported], "train"))) == [f"image_{i:02d}.png" for i in (0, 1, 3, 4)]


def test_load_samples_image_without_caption_raises(tmp_path):
    dataset = make_dataset(tmp_path)
    edit(dataset.text_embeds.entries_path, lambda table: table[table["path"] != "image_03.png"])
    with pytest.raises(UserError, match=r"no caption embedding \(image_03.png\)"):
        load_samples([dataset], "train")


@pytest.mark.parametrize("table", ["latents", "texts"])
def test_load_samples_image_changed_between_stages_raises(tmp_path, table):
    dataset = make_dataset(tmp_path)
    edit(str(Path(tmp_path) / f"{table}.parquet"), lambda t: t.assign(key=["other", *t["key"][1:]]))
    with pytest.raises(UserError, match="materialize"):
        load_samples([dataset], "train")


def test_samples_digest_equals_the_recorded_one(tmp_path):
    # a part of every run's identity: another value would make all finished and unfinished runs start again
    assert load_samples([make_dataset(tmp_path)], "train").digest() == RECORDED_DIGEST


def test_samples_digest_changes_with_training_inputs(tmp_path):
    dataset = make_dataset(tmp_path)
    before = load_samples([dataset], "train").digest()
    assert before == load_samples([dataset], "train").digest()
    edit(dataset.rows_path, lambda rows: rows.assign(crop_left=[1, *rows["crop_left"][1:]]))
    assert load_samples([dataset], "train").digest() != before
