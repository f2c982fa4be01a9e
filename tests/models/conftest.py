"""The bundled model, resolved once, and fixtures that resolve other models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import BUNDLED_MODEL, BUNDLED_NAME, ResolvedModel, resolve_base_model

Resolve = Callable[..., ResolvedModel]


@pytest.fixture(scope="session")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    settings = TrainingSettings(pretrained_model_name_or_path=BUNDLED_NAME)
    return resolve_base_model(settings, Path.cwd(), tmp_path_factory.mktemp("digests"))


@pytest.fixture(scope="session")
def random_filled(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """The bundled model with weights that are all zero, as in an untrained UNet, replaced by random ones, so that every layer affects the
    output.
    """
    import torch
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(BUNDLED_MODEL, tmp_path_factory.mktemp("lively") / "model"))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: tensor
        if tensor.any()
        else (0.1 * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in sorted(load_file(weights).items())
    }
    save_file(tensors, weights, {"format": "pt"})
    settings = TrainingSettings(pretrained_model_name_or_path=str(folder))
    return resolve_base_model(settings, folder, tmp_path_factory.mktemp("digests"))


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
