"""The encode stages write bit-identical stores with one and two processes, which fail and stop together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from sdxl_pipeline.cache.store.tensor_store import TensorStore
from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.data.buckets.crop_plan import plan_crops
from sdxl_pipeline.data.scan.dataset_scan import scan_dataset
from sdxl_pipeline.models.base_model import BUNDLED_NAME, resolve_base_model
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EncodeLatentsSpec, EncodeTextSpec, LatentCache, TextEmbedCache
from sdxl_pipeline.runtime.stage_runner import StopSignal
from sdxl_pipeline.stages import encode_latents, encode_text
from tests.support.processes import runs, wait_for, wait_for_number

REPOSITORY = Path(__file__).parents[2]
SIZES = [(64, 64), (128, 64), (64, 128)]


def latents_spec(root: Path, processes: int) -> EncodeLatentsSpec:
    data = root / "data"
    if not data.exists():
        data.mkdir(parents=True)
        for index in range(11):
            Image.effect_noise(SIZES[index % 3], 20 * index + 10).convert("RGB").save(data / f"{index}.png")
    dataset = ImageDataset(
        id="noise", instance_data_dir=data, resolution=64, aspect_bucket_alignment=32, crop=True, crop_aspect="preserve"
    )  # fmt: skip
    rows, _ = plan_crops(dataset, scan_dataset(dataset, data), seed=0, held_out=(), is_eval=False)
    rows.to_parquet(root / "rows.parquet")
    output = root / str(processes)
    return EncodeLatentsSpec(
        base_model=resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), root),
        hardware=PRESETS["cpu"].model_copy(update={"vae_batch_size": 2, "num_processes": processes}),
        data_dir=str(data),
        rows_path=str(root / "rows.parquet"),
        store_root=str(output / "store"),
        entries_path=str(output / "entries.parquet"),
        sample_path=str(output / "sample.png"),
    )


def text_spec(root: Path, processes: int) -> EncodeTextSpec:
    captions = [(f"{index}.png", f"{index:02d}", f"image {'very ' * index} {index}") for index in range(40)]
    pd.DataFrame(captions, columns=["path", "key", "caption"]).to_parquet(root / "captions.parquet")
    output = root / str(processes)
    return EncodeTextSpec(
        base_model=resolve_base_model(TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME), root),
        hardware=PRESETS["cpu"].model_copy(update={"text_encoder_batch_size": 4, "num_processes": processes}),
        captions_path=str(root / "captions.parquet"),
        extra_prompts=("a star",),
        store_root=str(output / "texts"),
        entries_path=str(output / "text_entries.parquet"),
        prompts_path=str(output / "prompts.parquet"),
        windows=2,
    )


def start(spec: EncodeLatentsSpec | EncodeTextSpec, module: str, **environment: str) -> subprocess.Popen[str]:
    """Start a stage like the launcher does."""
    folder = Path(spec.entries_path).parent
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{module.rpartition('.')[2]}.spec.json"
    path.write_text(spec.model_dump_json())
    ranks = spec.hardware.num_processes
    torchrun = ["sdxl_pipeline.runtime.torchrun", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    return subprocess.Popen(
        [
            sys.executable, "-m", *(torchrun if ranks > 1 else []), module, str(path),
            "--manifest", str(path.with_suffix(".manifest.json")),
        ],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def manifest(spec: EncodeLatentsSpec | EncodeTextSpec, module: str) -> Any:
    kind = LatentCache if isinstance(spec, EncodeLatentsSpec) else TextEmbedCache
    path = Path(spec.entries_path).with_name(f"{module.rpartition('.')[2]}.spec.manifest.json")
    return kind.model_validate_json(path.read_text())


def assert_same_entries(one: Path, other: Path) -> None:
    stores = TensorStore(one), TensorStore(other)
    assert stores[0].keys() == stores[1].keys()
    for key in stores[0].keys():  # noqa: SIM118 - a store is not a mapping
        first, second = (store.read(key) for store in stores)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name])


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_encode_two_processes_write_same_store_as_one(tmp_path: Path):
    latents, two_latents = latents_spec(tmp_path, 1), latents_spec(tmp_path, 2)
    texts, two_texts = text_spec(tmp_path, 1), text_spec(tmp_path, 2)
    processes = [
        start(two_latents, "sdxl_pipeline.stages.encode_latents"),
        start(two_texts, "sdxl_pipeline.stages.encode_text"),
    ]
    manifests = (
        encode_latents.main(latents, Reporter(), StopSignal()),
        encode_text.main(texts, Reporter(), StopSignal()),
    )
    for process, one, two, first in zip(
        processes, (latents, texts), (two_latents, two_texts), manifests, strict=True
    ):
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
        assert_same_entries(Path(one.store_root), Path(two.store_root))
        second = manifest(two, "encode_text" if isinstance(two, EncodeTextSpec) else "encode_latents")
        assert first is not None
        assert first.encoded == second.encoded > 0
        assert first.digest == second.digest
        pd.testing.assert_frame_equal(pd.read_parquet(one.entries_path), pd.read_parquet(two.entries_path))
        assert not list(Path(two.entries_path).parent.glob(".*ranks*")), (
            "the files of the rank exchange are deleted"
        )
        shards = [len(list((Path(spec.store_root) / "shards").iterdir())) for spec in (one, two)]
        assert shards == [1, 2], "each process wrote its share"


@pytest.mark.slow
def test_encode_latents_failing_process_fails_stage_with_its_error(tmp_path: Path):
    spec = latents_spec(tmp_path, 2)
    process = start(spec, "tests.stages.distributed.encode_latents", TROUBLE="fails")
    output = process.communicate(timeout=240)[0]
    assert process.returncode not in (0, None), output
    failure = json.loads((tmp_path / "2" / "encode_latents.spec.manifest.error.json").read_text())
    assert failure["kind"] == "user"
    assert failure["message"] == "the second process cannot go on"
    assert not Path(spec.entries_path).exists()


@pytest.mark.slow
def test_encode_latents_stop_ends_all_processes_and_keeps_entries(tmp_path: Path):
    spec = latents_spec(tmp_path, 2)
    process = start(spec, "tests.stages.distributed.encode_latents", TROUBLE=str(tmp_path / "pid"))
    second = wait_for_number(tmp_path / "pid", 120)
    wait_for(
        lambda: (tmp_path / "2" / "store" / "index.parquet").exists(), 120, "entries of the first process"
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not runs(second)
    assert not Path(spec.entries_path).exists()
    stored = len(TensorStore(spec.store_root))
    assert 0 < stored < 11
    again = start(spec, "sdxl_pipeline.stages.encode_latents")
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    cache = manifest(spec, "sdxl_pipeline.stages.encode_latents")
    assert (cache.encoded, cache.reused) == (11 - stored, stored)
