"""A whole UNet as users get it: a folder of safetensors and their configuration, looked at without loading the model."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_pipeline.models.base_model import ResolvedModel

if TYPE_CHECKING:
    from torch import Tensor


def non_finite_weights(folder: Path) -> tuple[int, list[str]]:
    """How many weights the shards of a UNet folder hold, and the names of those with NaN or infinity; read one at a time."""
    import torch
    from safetensors import safe_open

    names, unsound = 0, []
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                names += 1
                if not torch.isfinite(file.get_tensor(name)).all():
                    unsound.append(name)
    return names, sorted(unsound)


def misfits(folder: Path, base_model: ResolvedModel) -> list[str]:
    """Names of weights that the folder lacks, has too many, or has in another shape than the base model's UNet; sorted.

    Raises OSError, ValueError or SafetensorError for what is no UNet folder of diffusers.
    """
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unets = [
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(place, **where))
            for place, where in ((folder, {}), (base_model.config_path, {"subfolder": "unet"}))
        ]
    own, wanted = (
        {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()} for unet in unets
    )
    found = tensor_shapes(folder)
    names = own.keys() | wanted.keys() | found.keys()
    return sorted(name for name in names if not own.get(name) == wanted.get(name) == found.get(name))


class _LazyTensors(Mapping[str, "Tensor"]):
    """The tensors of open safetensors files, each read when it is asked for."""

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
    """Give the weights of a UNet folder by name; none is in memory before it is asked for."""
    from safetensors import safe_open

    with ExitStack() as files:
        yield _LazyTensors(
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
