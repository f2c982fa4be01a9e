"""A whole UNet as users get it: a folder of safetensors and their configuration, looked at without loading the model."""

from collections.abc import Iterator
from pathlib import Path

from sdxl_pipeline.sdxl.base_model import ResolvedModel


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
    found = dict(_shapes(folder))
    names = own.keys() | wanted.keys() | found.keys()
    return sorted(name for name in names if not own.get(name) == wanted.get(name) == found.get(name))


def _shapes(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    from safetensors import safe_open

    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, tuple(file.get_slice(name).get_shape())


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
