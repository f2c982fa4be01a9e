"""The first stages on a folder of the corpus (scan, hash, plan, encode), and assertions about their results."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cache.encode.cache_keys import latent_keys
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.quality.perceptual_hash import compute_hashes
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.models.components import latent_scaling_factor, load_vae
from sdxl_pipeline.models.vae import decode, encode_moments, pixels_from_crops
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, LatentCache
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages import encode_latents
from tests.corpus.cases import Kept


def make_dataset(folder: Path) -> ImageDataset:
    return ImageDataset(
        id="corpus", instance_data_dir=folder, caption_strategy="textfile", resolution=64, aspect_bucket_alignment=32,
        crop=True, crop_aspect="preserve", crop_style="center",
    )  # fmt: skip


def scan(folder: Path) -> pd.DataFrame:
    """Return the folder's files as the dataset asset does: scanned, with perceptual hashes."""
    dataset = make_dataset(folder)
    frame = compute_hashes(folder, scan_dataset(dataset, folder), folder.parent / "work" / "looks.parquet")
    assert frame["path"].is_unique
    assert ((frame["status"] == "kept") | (frame["status"] == "dropped")).all()
    assert ((frame["reason"] != "") == (frame["status"] == "dropped")).all()
    return frame


def check_frame(frame: pd.DataFrame, outcomes: Mapping[str, Kept | str]) -> None:
    """Assert that every file has its expected outcome, and that there is no other file."""
    rows = {row.path: row for row in frame.itertuples(index=False)}
    assert set(rows) == set(outcomes)
    for path, outcome in outcomes.items():
        row = rows[path]
        if isinstance(outcome, str):
            assert (row.status, row.reason) == ("dropped", outcome), path
        else:
            assert (row.status, row.reason) == ("kept", ""), path
            assert (row.width, row.height) == outcome.image.size, path
            assert list(row.captions) == [outcome.caption], path


def planned_pixels(image: Image.Image, row: pd.Series) -> np.ndarray:
    """Return the crop of a plan's row from an upright sRGB image, resized from the full image."""
    if image.width * row.resized_h > 10**8 or image.height * row.resized_w > 10**8:
        pytest.fail("too large to resize in full")
    scale = (row.original_w / row.resized_w, row.original_h / row.resized_h)
    left, top = row.crop_left * scale[0], row.crop_top * scale[1]
    box = (left, top, left + row.bucket_w * scale[0], top + row.bucket_h * scale[1])
    box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
    return np.asarray(image.resize((row.bucket_w, row.bucket_h), Image.Resampling.LANCZOS, box=box)).astype(
        int
    )


def make_spec(folder: Path, data: Path, rows: pd.DataFrame, store: Path | None = None) -> EncodeLatentsSpec:
    rows.to_parquet(folder / "rows.parquet")
    return EncodeLatentsSpec(
        base_model=resolve_base_model(
            TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), Path.cwd()
        ),
        hardware=PRESETS["cpu"].model_copy(update={"vae_batch_size": 4}),
        data_dir=str(data),
        rows_path=str(folder / "rows.parquet"),
        store_root=str(store or folder / "store"),
        entries_path=str(folder / "entries.parquet"),
        sample_path=str(folder / "sample.png"),
    )


def encode(spec: EncodeLatentsSpec) -> LatentCache:
    cache = encode_latents.main(spec, Reporter(), StopSignal())
    assert cache is not None
    return cache


def check_latents(spec: EncodeLatentsSpec, rows: pd.DataFrame, outcomes: Mapping[str, Kept | str]) -> None:
    """Assert that the stored latents are those of the expected pixels and decode to them."""
    vae, store = load_vae(spec.base_model, torch.float32), TensorStore(spec.store_root)
    scale = latent_scaling_factor(spec.base_model)
    keys = latent_keys(rows, spec.base_model.vae_digest, spec.hardware.vae_dtype)
    for row, key in zip(rows.itertuples(index=False), keys, strict=True):
        outcome = outcomes[row.path]
        assert isinstance(outcome, Kept)
        stored = store.read(key)["mean"].float()
        expected = planned_pixels(outcome.image, row)
        mean, _ = encode_moments(vae, pixels_from_crops([expected.astype(np.uint8)]))
        assert (stored - mean[0]).abs().mean() < 0.1 * mean.std() + 0.02, row.path
        decoded = decode(vae, stored[None] * scale)[0].permute(1, 2, 0).numpy() * 255
        if (
            np.abs(expected - expected[::-1]).mean() > 40
        ):  # the small VAE loses detail but preserves the vertical orientation
            assert np.abs(decoded - expected).mean() < np.abs(decoded - expected[::-1]).mean(), row.path
