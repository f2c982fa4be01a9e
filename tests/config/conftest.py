"""Fixtures that write project folders and return the problems of their files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.config.loader import load_project
from sdxl_pipeline.config.problems import Problem, ProjectError

QUICKSTART_CONFIG = """{
  "model_type": "lora",
  "model_family": "sdxl",
  "model_flavour": "base-1.0",
  "output_dir": "/home/user/output/models",
  "validation_resolution": "1024x1024,1280x768",
  "validation_guidance": 3.4,
  "use_gradient_checkpointing": true,
  "learning_rate": 1e-4
}"""

QUICKSTART_DATASETS = """[
  {
    "id": "pseudo-camera-10k-sdxl",
    "type": "local",
    "crop": true,
    "crop_aspect": "square",
    "crop_style": "random",
    "resolution": 1.0,
    "minimum_image_size": 0.25,
    "maximum_image_size": 1.0,
    "target_downsample_size": 1.0,
    "resolution_type": "area",
    "cache_dir_vae": "cache/vae/sdxl/pseudo-camera-10k",
    "instance_data_dir": "/home/user/simpletuner/datasets/pseudo-camera-10k",
    "disabled": false,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery"
  },
  {
    "id": "text-embeds",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": true,
    "cache_dir": "cache/text/sdxl/pseudo-camera-10k",
    "disabled": false,
    "write_batch_size": 128
  }
]"""

IMAGE_ENTRY = {"id": "cats", "instance_data_dir": "data"}


@pytest.fixture
def write_project(tmp_path: Path) -> Callable[..., Path]:
    """Writes a project folder from two objects (or texts); `datasets` defaults to one folder of images."""

    def write(config: Any = None, datasets: Any = None, name: str = "cat_lora") -> Path:
        folder = tmp_path / "projects" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in (
            ("config.json", config or {}),
            ("multidatabackend.json", datasets or [IMAGE_ENTRY]),
        ):
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    return write


@pytest.fixture
def problems_of(write_project: Callable[..., Path]) -> Callable[..., dict[str, Problem]]:
    """The problems of a project by key; fails if it has none or two for one key."""

    def problems(config: Any = None, datasets: Any = None) -> dict[str, Problem]:
        with pytest.raises(ProjectError) as caught:
            load_project(write_project(config, datasets))
        by_key = {problem.key: problem for problem in caught.value.problems}
        assert len(by_key) == len(caught.value.problems)
        assert all(problem.message and problem.hint for problem in caught.value.problems)
        return by_key

    return problems
