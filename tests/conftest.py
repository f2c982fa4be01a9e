"""Small projects on the bundled model, in the files that a user writes."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.storage.defs_state.base import set_defs_state_storage
from PIL import Image, ImageDraw

COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "white", "black"]

CONFIG: Mapping[str, Any] = {
    "model_type": "lora",
    "model_family": "sdxl",
    "pretrained_model_name_or_path": "bundled:tiny-sdxl",
    "output_dir": "output",
    "max_train_steps": 3,
    "train_batch_size": 2,
    "learning_rate": 1e-3,
    "lora_rank": 4,
    "checkpoint_step_interval": 2,
    "validation_prompt": "a large red circle on a white background",
    "validation_resolution": "128x128",
    "validation_num_inference_steps": 2,
    "validation_step_interval": 100,
    "evaluation_type": "clip",
    "eval_timesteps": 3,
    "num_probe_images": 2,
    "num_caption_samples": 0,
    "gallery_checkpoints": 0,
    "eval_holdout_share": 0.25,
    "resume_from_checkpoint": "latest",
}

DATASET: Mapping[str, Any] = {
    "id": "shapes",
    "type": "local",
    "instance_data_dir": "data",
    "resolution": 128,
    "resolution_type": "pixel_area",
    "aspect_bucket_alignment": 32,
    "crop": True,
    "crop_aspect": "preserve",
    "crop_style": "random",
    "caption_strategy": "textfile",
}


def draw_image(folder: Path, index: int) -> Path:
    """Save an image and its caption, which depend on the index; every third is wider, every third taller."""
    size = [(128, 128), (192, 112), (112, 192)][index % 3]
    shape, background = COLOURS[index % 8], COLOURS[(index + 3) % 8]
    image = Image.new("RGB", size, background)
    box = (20 + index % 7, 24, 90, 92 + index % 5)
    (ImageDraw.Draw(image).ellipse if index % 2 else ImageDraw.Draw(image).rectangle)(box, fill=shape)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"image_{index:02d}.png"
    image.save(path)
    noun = "circle" if index % 2 else "square"
    path.with_suffix(".txt").write_text(f"a {shape} {noun} on a {background} background, number {index}")
    return path


@pytest.fixture(autouse=True)
def isolated_storage(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test its own storage, and the hardware profile `cpu`."""
    root = tmp_path_factory.mktemp("storage")
    monkeypatch.setenv("SDXL_PIPELINE_STORAGE", str(root))
    monkeypatch.setenv("SDXL_HARDWARE", "cpu")
    return root


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.instance_for_test() as test_instance:
        yield test_instance


def write_project(
    root: Path,
    name: str = "small",
    images: int = 8,
    config: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> Path:
    """Write the project `root`/projects/`name` with changes of `CONFIG` and `DATASET`, and return its folder."""
    folder = root / "projects" / name
    folder.mkdir(parents=True)
    for index in range(images):
        draw_image(folder / "data", index)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "multidatabackend.json").write_text(json.dumps([{**DATASET, **(dataset or {})}]))
    return folder


@pytest.fixture
def make_project(tmp_path: Path) -> Callable[..., Path]:
    """Return `write_project` in the test's folder: `make_project("name", images=8, config={...}, dataset={...})`."""
    return partial(write_project, tmp_path)


@pytest.fixture(autouse=True)
def fresh_defs_state() -> Iterator[None]:
    """Hide the state storage of an earlier test's instance, which Dagster keeps after that instance is closed and then fails on."""
    with set_defs_state_storage(None):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch with one thread: faster than more on a busy machine, and the number of threads decides the last bits of a sum."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Reset accelerate's state, which keeps one mixed precision per process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
