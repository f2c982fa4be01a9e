"""The latent stage encodes each crop once under its own key, and a stop keeps the finished entries.

Images are scanned, planned, encoded and read back with the bundled model on the CPU.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cache.encode import encoders, latent_encoding
from sdxl_pipeline.cache.encode.encoders import load_latent_encoder
from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.decoding.pixels import load_crop
from sdxl_pipeline.data.scan.dataset_fingerprint import frame_digest
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME, ResolvedModel, resolve_base_model
from sdxl_pipeline.models.components import load_vae
from sdxl_pipeline.models.vae import encode_moments, pixels_from_crops
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, LatentCache
from sdxl_pipeline.runtime.stage_runner import StageStopped, StopSignal, UserError
from sdxl_pipeline.stages import encode_latents

COLORS = ["red", "lime", "blue", "yellow", "white", "black", "orange"]
SIZES = [(64, 64), (128, 64), (64, 128)]  # (width, height)


def model(**settings: Any) -> ResolvedModel:
    training = TrainingSettings(**{"pretrained_model_name_or_path": BUNDLED_NAME, **settings})
    return resolve_base_model(training, Path.cwd())


def write_images(folder: Path, count: int = 7) -> None:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        image = Image.new("RGB", SIZES[index % 3], COLORS[index % len(COLORS)])
        image.putpixel((index, 0), (1, 2, 3))
        image.save(folder / f"{index:02d}.png")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_images(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def make_spec(tmp_path: Path, data: Path) -> Callable[..., EncodeLatentsSpec]:
    """Return a function that scans and plans the data folder and returns the stage's spec."""

    def make(
        base_model: ResolvedModel | None = None, plan: bool = True, **hardware: Any
    ) -> EncodeLatentsSpec:
        if plan:
            dataset = ImageDataset(
                id="colors", instance_data_dir=data, resolution=64, aspect_bucket_alignment=32, crop=True,
                crop_aspect="preserve",
            )  # fmt: skip
            rows, _ = plan_crops(dataset, scan_dataset(dataset, data), seed=0, held_out=(), is_eval=False)
            rows.to_parquet(tmp_path / "rows.parquet")
        return EncodeLatentsSpec(
            base_model=base_model or model(),
            hardware=PRESETS["cpu"].model_copy(update={"vae_batch_size": 2, **hardware}),
            data_dir=str(data),
            rows_path=str(tmp_path / "rows.parquet"),
            store_root=str(tmp_path / "store"),
            entries_path=str(tmp_path / "entries.parquet"),
            sample_path=str(tmp_path / "sample.png"),
        )

    return make


def run(
    spec: EncodeLatentsSpec, reporter: Reporter | None = None, stop: StopSignal | None = None
) -> LatentCache:
    return encode_latents.main(spec, reporter or Reporter(), stop or StopSignal())


def counts(cache: LatentCache) -> tuple[int, int, int, int]:
    return cache.planned, cache.encoded, cache.reused, len(cache.failed)


def test_encode_latents_stores_latents_of_each_crop(make_spec, data: Path):
    spec = make_spec()
    cache = run(spec)
    assert counts(cache) == (7, 7, 0, 0)
    entries = pd.read_parquet(spec.entries_path).set_index("path")
    rows = list(pd.read_parquet(spec.rows_path).itertuples(index=False))
    assert list(entries.index) == [row.path for row in rows]
    assert len({(row.bucket_h, row.bucket_w) for row in rows}) == 3
    vae, store = load_vae(spec.base_model, torch.float32), TensorStore(spec.store_root)
    means = {}
    for row in rows:
        mean, logvar = encode_moments(vae, pixels_from_crops([load_crop(data / row.path, row)]))
        stored = store.read(entries.loc[row.path, "latent_key"])
        assert stored["mean"].shape == (4, row.bucket_h // 8, row.bucket_w // 8)
        torch.testing.assert_close(stored["mean"], mean[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(stored["logvar"], logvar[0], atol=1e-4, rtol=1e-4)
        assert entries.loc[row.path, "key"] == row.key
        means[row.path] = stored["mean"].mean((1, 2))
    closest = torch.pdist(torch.stack(list(means.values()))).min()
    assert closest > 1e-3, "the images differ by far more than the tolerance above"


def test_encode_latents_manifest_describes_the_entries(make_spec, tmp_path: Path):
    spec = make_spec()
    cache = run(spec)
    store, entries = TensorStore(spec.store_root), pd.read_parquet(spec.entries_path)
    scale = load_vae(spec.base_model, torch.float32).config.scaling_factor
    values = torch.cat([store.read(key)["mean"].flatten(1) for key in entries["latent_key"]], dim=1) * scale
    assert cache.latent_mean == pytest.approx(values.mean(1).tolist(), abs=1e-5)
    assert cache.latent_std == pytest.approx(values.std(1, correction=0).tolist(), abs=1e-5)
    assert cache.bytes == sum(t.nbytes for key in entries["latent_key"] for t in store.read(key).values())
    assert cache.digest == frame_digest(entries, ("key", "crop_index", "latent_key"))
    assert cache.measured == 7
    assert cache.images_per_second is not None
    assert cache.images_per_second > 0
    assert cache.vae_busy is not None
    assert 0 < cache.vae_busy <= 1
    assert cache.seconds > 0
    with Image.open(tmp_path / "sample.png") as sample:
        assert len(sample.convert("RGB").getcolors(1 << 20)) > 8, (
            "crops and their reconstructions are visible"
        )
    assert LatentCache.model_validate_json(cache.model_dump_json()) == cache


def test_encode_latents_second_run_does_not_load_the_vae(make_spec, monkeypatch, tmp_path: Path):
    spec = make_spec()
    first = run(spec)
    sample = (tmp_path / "sample.png").stat().st_mtime_ns
    monkeypatch.setattr(encoders, "load_vae", lambda *_: pytest.fail("the VAE was loaded"))
    second = run(spec)
    assert counts(second) == (7, 0, 7, 0)
    assert second.images_per_second is None
    assert second.digest == first.digest
    assert (second.latent_mean, second.bytes) == (first.latent_mean, first.bytes)
    assert (tmp_path / "sample.png").stat().st_mtime_ns == sample


def test_encode_latents_new_image_encodes_only_it(make_spec, data: Path):
    first = run(make_spec())
    Image.new("RGB", (64, 64), "pink").save(data / "new.png")
    second = run(make_spec())
    assert counts(second) == (8, 1, 7, 0)
    assert second.digest != first.digest


def test_encode_latents_duplicate_image_is_encoded_once(make_spec, data: Path):
    shutil.copy(data / "00.png", data / "copy.png")
    spec = make_spec()
    assert counts(run(spec)) == (8, 7, 1, 0)
    keys = pd.read_parquet(spec.entries_path).set_index("path")["latent_key"]
    assert keys["00.png"] == keys["copy.png"]
    assert keys.nunique() == 7


def test_encode_latents_renamed_images_reuse_entries_and_digest(make_spec, data: Path):
    first = run(make_spec())
    (data / "03.png").rename(data / "zebra.png")
    (data / "deep").mkdir()
    (data / "05.png").rename(data / "deep" / "a.png")
    spec = make_spec()
    second = run(spec)
    assert counts(second) == (7, 0, 7, 0)
    assert second.digest == first.digest
    assert {"zebra.png", "deep/a.png"} < set(pd.read_parquet(spec.entries_path)["path"])


def test_encode_latents_missing_copy_uses_other_copy(make_spec, data: Path):
    shutil.copy(data / "00.png", data / "copy.png")
    spec = make_spec()
    (data / "00.png").unlink()
    assert counts(run(spec)) == (8, 7, 1, 0)


def test_encode_latents_missing_folder_raises(make_spec, data: Path):
    spec = make_spec()
    data.rename(data.with_name("moved"))
    with pytest.raises(UserError, match=r"folder .*data does not exist.*instance_data_dir"):
        run(spec)


@pytest.mark.parametrize("mode", ["ondemand", "disable"])
def test_encode_latents_cache_mode_defers_missing_entries(make_spec, mode: str):
    full = run(make_spec())
    store = TensorStore(make_spec().store_root)
    entries = pd.read_parquet(make_spec().entries_path)
    before, size = len(store), store.entry_nbytes(entries["latent_key"])
    other = make_spec(vae_dtype="bf16", plan=False).model_copy(update={"mode": mode})
    cache = run(other)
    assert (cache.planned, cache.encoded, cache.reused, cache.deferred) == (7, 0, 0, 7)
    assert cache.digest != full.digest
    listed = pd.read_parquet(other.entries_path)
    assert list(listed.columns) == list(entries.columns)
    assert list(listed["path"]) == list(entries["path"])
    same = run(make_spec(plan=False).model_copy(update={"mode": mode}))
    assert same.digest == full.digest
    assert (same.reused, same.deferred) == ((7, 0) if mode == "ondemand" else (0, 7))
    assert same.bytes == (size if mode == "ondemand" else 0)
    assert len(TensorStore(other.store_root)) == before
    assert counts(run(make_spec(plan=False))) == (7, 0, 7, 0), "back in full mode"


def test_encode_latents_trust_recorded_skips_store_check(make_spec):
    first = run(make_spec())
    shutil.rmtree(make_spec(plan=False).store_root)
    trusted = run(make_spec(plan=False).model_copy(update={"trust_manifest": True}))
    assert counts(trusted) == (7, 0, 7, 0)
    assert trusted.digest == first.digest
    assert counts(run(make_spec(plan=False))) == (7, 7, 0, 0)


def test_encode_latents_deferred_manifest_is_not_trusted_as_encoded(make_spec):
    run(make_spec().model_copy(update={"mode": "ondemand"}))
    assert counts(run(make_spec().model_copy(update={"trust_manifest": True}))) == (7, 7, 0, 0)


def test_encode_latents_nothing_to_encode_does_not_import_torch(make_spec, tmp_path: Path):
    run(make_spec())
    for mode in ("full", "ondemand", "disable"):
        spec = make_spec(plan=False).model_copy(update={"mode": mode})
        (tmp_path / "spec.json").write_text(spec.model_dump_json())
        program = (
            "import sys; from pathlib import Path; from sdxl_pipeline.stages.encode_latents import *;"
            f"spec = EncodeLatentsSpec.model_validate_json(Path({str(tmp_path / 'spec.json')!r}).read_text());"
            "cache = main(spec, Reporter(), StopSignal()); assert cache.planned == 7; assert 'torch' not in sys.modules"
        )
        completed = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False
        )
        assert completed.returncode == 0, completed.stderr


def test_encode_latents_crops_of_one_image_decode_it_once(make_spec, data: Path, monkeypatch):
    spec = make_spec(vae_batch_size=8)
    rows = pd.read_parquet(spec.rows_path).iloc[[0, 3]]
    pd.concat([rows, rows.assign(crop_index=1, flipped=True)]).to_parquet(spec.rows_path)
    read: list[str] = []
    original = latent_encoding.read_crops
    monkeypatch.setattr(
        latent_encoding,
        "read_crops",
        lambda path, key, crops: read.append(path.name) or original(path, key, crops),
    )
    assert counts(run(spec)) == (4, 4, 0, 0)
    assert sorted(read) == ["00.png", "03.png"]
    entries = pd.read_parquet(spec.entries_path)
    store = TensorStore(spec.store_root)
    for path in ("00.png", "03.png"):
        plain, mirrored = entries.loc[entries["path"] == path, "latent_key"]
        assert not torch.equal(store.read(plain)["mean"], store.read(mirrored)["mean"])


def test_encode_latents_other_vae_or_dtype_encodes_again_other_text_encoder_does_not(
    make_spec, tmp_path: Path
):
    first = run(make_spec())
    folder = shutil.copytree(BUNDLED_MODEL, tmp_path / "model")
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-05', '"layer_norm_eps": 2e-05'))
    other_text = model(pretrained_model_name_or_path=str(folder))
    assert other_text.text_digest != model().text_digest
    assert counts(run(make_spec(other_text))) == (7, 0, 7, 0)
    config = folder / "vae" / "config.json"
    config.write_text(config.read_text().replace('"act_fn": "silu"', '"act_fn": "gelu"'))
    other_vae = run(make_spec(model(pretrained_model_name_or_path=str(folder))))
    assert counts(other_vae) == (7, 7, 0, 0)
    assert other_vae.digest != first.digest
    in_bf16 = make_spec(vae_dtype="bf16")
    assert counts(run(in_bf16)) == (7, 7, 0, 0)
    key = pd.read_parquet(in_bf16.entries_path)["latent_key"][0]
    assert TensorStore(in_bf16.store_root).read(key)["mean"].dtype == torch.bfloat16


def test_encode_latents_unreadable_images_are_listed_as_failed(make_spec, data: Path):
    spec = make_spec()
    (data / "02.png").write_bytes((data / "02.png").read_bytes()[:60])
    (data / "04.png").unlink()
    (data / "05.png").write_bytes((data / "06.png").read_bytes())
    cache = run(spec)
    assert counts(cache) == (7, 4, 0, 3)
    reasons = {failed.name: failed.reason for failed in cache.failed}
    assert set(reasons) == {"02.png", "04.png", "05.png"}
    assert "changed since the dataset was scanned" in reasons["05.png"]
    assert "No such file" in reasons["04.png"]
    entries = pd.read_parquet(spec.entries_path)
    assert list(entries["path"]) == ["00.png", "01.png", "03.png", "06.png"]
    assert len(TensorStore(spec.store_root)) == 4
    assert cache.digest == frame_digest(entries, ("key", "crop_index", "latent_key"))


def test_encode_latents_undecodable_image_is_listed_as_failed(make_spec, data: Path):
    """The file is truncated and its digest in the plan adjusted, so that only the decoder detects it."""
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    image.save(data / "noise.png")
    spec = make_spec()
    rows = pd.read_parquet(spec.rows_path)
    (data / "noise.png").write_bytes((data / "noise.png").read_bytes()[:2000])
    from sdxl_pipeline.files.atomic_files import sha256_file

    rows.loc[rows["path"] == "noise.png", "key"] = sha256_file(data / "noise.png")
    rows.to_parquet(spec.rows_path)
    cache = run(spec)
    assert [failed.name for failed in cache.failed] == ["noise.png"]
    assert counts(cache) == (8, 7, 0, 1)


def test_encode_latents_nonfinite_latents_are_listed_as_failed_and_not_stored(make_spec, monkeypatch):
    def overflow_on_blue(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = encode_moments(vae, pixels)
        blue = (pixels[:, 2].mean((1, 2)) > 0.9) & (pixels[:, 0].mean((1, 2)) < -0.9)
        mean[blue] = torch.inf
        return mean, logvar

    monkeypatch.setattr(latent_encoding, "encode_moments", overflow_on_blue)
    spec = make_spec()
    cache = run(spec)
    assert [(failed.name, "NaN" in failed.reason, "fp32" in failed.reason) for failed in cache.failed] == [
        ("02.png", True, True)
    ]
    assert counts(cache) == (7, 6, 0, 1)
    assert len(TensorStore(spec.store_root)) == 6


def encode_infinite(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, logvar = encode_moments(vae, pixels)
    return mean * torch.inf, logvar


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [("bf16", "set vae_dtype to fp32"), ("fp32", "set pretrained_vae_model_name_or_path to another VAE")],
)
def test_encode_latents_nonfinite_hint_depends_on_dtype(make_spec, data, monkeypatch, dtype, hint):
    spec = make_spec(vae_dtype=dtype)
    monkeypatch.setattr(latent_encoding, "encode_moments", encode_infinite)
    reasons = {failed.reason for failed in run(spec).failed}
    assert len(reasons) == 1
    assert hint in reasons.pop()
    monkeypatch.setattr(encoders, "encode_moments", encode_infinite)
    row = next(pd.read_parquet(spec.rows_path).itertuples())
    with pytest.raises(UserError, match=f"{row.path}.*{hint}"):
        encoders.LatentEncoder(spec.base_model, spec.hardware).encode(data / row.path, row)


def test_encode_latents_nonfinite_vae_weight_raises_with_its_name(make_spec, monkeypatch):
    def load_broken(*arguments: Any) -> Any:
        vae = load_latent_encoder(*arguments)
        vae.encoder.conv_in.weight.data[0, 0, 0, 0] = torch.nan
        return vae

    monkeypatch.setattr(latent_encoding, "load_latent_encoder", load_broken)
    with pytest.raises(
        UserError,
        match=r"the VAE of bundled:tiny-sdxl has NaN or infinite weights.*encoder.conv_in.weight.*Download",
    ):
        run(make_spec())


def test_encode_latents_batch_size_changes_latents_only_by_rounding(make_spec, tmp_path: Path):
    one = make_spec(vae_batch_size=1)
    run(one)
    keys = list(pd.read_parquet(one.entries_path)["latent_key"])
    expected = {key: TensorStore(one.store_root).read(key)["mean"].clone() for key in keys}
    shutil.rmtree(tmp_path / "store")
    four = make_spec(vae_batch_size=4)
    run(four)
    assert list(pd.read_parquet(four.entries_path)["latent_key"]) == keys
    store = TensorStore(four.store_root)
    for key in keys:
        torch.testing.assert_close(store.read(key)["mean"], expected[key], atol=1e-4, rtol=1e-4)


def test_encode_latents_stopped_keeps_finished_entries(make_spec):
    stop = StopSignal()

    class StopAfterThree(Reporter):
        def progress(self, task: str, done: int, total: int, unit: str = "") -> None:
            if done >= 3:
                stop.request()

    spec = make_spec()
    with pytest.raises(StageStopped):
        run(spec, StopAfterThree(), stop)
    stored = len(TensorStore(spec.store_root))
    assert 3 <= stored < 7
    assert not Path(spec.entries_path).exists()
    assert counts(run(spec)) == (7, 7 - stored, stored, 0)


def test_encode_latents_empty_plan_returns_empty_manifest(make_spec):
    spec = make_spec()
    pd.read_parquet(spec.rows_path).iloc[:0].to_parquet(spec.rows_path)
    cache = run(spec)
    assert counts(cache) == (0, 0, 0, 0)
    assert (cache.latent_mean, cache.sample_path, cache.bytes) == ((), None, 0)
    assert list(pd.read_parquet(spec.entries_path).columns) == ["path", "crop_index", "key", "latent_key"]


@pytest.mark.slow
def test_encode_latents_program_writes_manifest(make_spec, tmp_path: Path):
    spec = make_spec()
    (tmp_path / "spec.json").write_text(spec.model_dump_json())
    completed = subprocess.run(
        [sys.executable, "-m", "sdxl_pipeline.stages.encode_latents", str(tmp_path / "spec.json")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "7 crops: 7 to encode" in completed.stdout
    assert "encode latents: 7 of 7 crops" in completed.stdout
    cache = LatentCache.model_validate_json((tmp_path / "manifest.json").read_text())
    assert counts(cache) == (7, 7, 0, 0)
