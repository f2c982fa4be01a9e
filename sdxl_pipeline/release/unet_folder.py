"""A full UNet in diffusers' folder format, checked and read without loading the model."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_pipeline.models.base_model import ResolvedModel

if TYPE_CHECKING:
    from torch import Tensor


def non_finite_weights(folder: Path) -> tuple[int, list[str]]:
    """Return the number of weights in a UNet folder and the sorted names of those with NaN or infinity; reads one tensor at a time."""
    import torch
    from safetensors import safe_open

    count, non_finite = 0, []
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                count += 1
                if not torch.isfinite(file.get_tensor(name)).all():
                    non_finite.append(name)
    return count, sorted(non_finite)


def mismatched_weights(folder: Path, base_model: ResolvedModel) -> list[str]:
    """Return the sorted names of weights that are missing, unexpected, or of another shape than in the base model's UNet.

    Raises OSError, ValueError or SafetensorError if `folder` is not a UNet folder of diffusers.
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unets = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(path, **options))
            for path, options in ((folder, {}), (base_model.config_path, {"subfolder": "unet"}))
        ]
    configured, expected = (
        {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()} for unet in unets
    )
    stored = tensor_shapes(folder)
    names = configured.keys() | expected.keys() | stored.keys()
    return sorted(
        name for name in names if not configured.get(name) == expected.get(name) == stored.get(name)
    )


class LazyTensors(Mapping[str, "Tensor"]):
    """The tensors of open safetensors files by name, each read on access."""

    def __init__(self, files: list[Any]) -> None:
        self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - not a dict

    def __getitem__(self, name: str) -> "Tensor":
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def open_tensors(folder: Path) -> "Iterator[Mapping[str, Tensor]]":
    """Yield the weights of a UNet folder by name; each is read on access."""
    from safetensors import safe_open

    with ExitStack() as files:
        yield LazyTensors(
            [files.enter_context(safe_open(shard, framework="pt")) for shard in _shards(folder)]
        )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of a UNet folder, in the order of `open_tensors`."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
