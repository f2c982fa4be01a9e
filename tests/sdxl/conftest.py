"""The bundled model, resolved once, and a way to resolve others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.project.training import TrainingSettings
from sdxl_pipeline.sdxl.base_model import BUNDLED_MODEL, BUNDLED_NAME, ResolvedModel, resolve_base_model

Resolve = Callable[..., ResolvedModel]


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    settings = TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME)
    return resolve_base_model(settings, Path.cwd(), tmp_path_factory.mktemp("digests"))


@pytest.fixture
def resolve(tmp_path: Path) -> Resolve:
    """`resolve("name", vae="...", revision="...")`, relative to tmp_path."""

    def resolve_name(name: str | None, vae: str | None = None, **settings: Any) -> ResolvedModel:
        training = TrainingSettings(
            pretrained_model_name_or_path=name, pretrained_vae_model_name_or_path=vae, **settings
        )
        return resolve_base_model(training, tmp_path, tmp_path / "digest-cache")

    return resolve_name


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the bundled model that a test may change."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "copy"))
