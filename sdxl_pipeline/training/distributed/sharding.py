"""A whole UNet divided among the processes: each holds a part of every weight, its gradient and its optimizer state (FSDP2, ZeRO-3).

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"; torch's `fully_shard`. A block's weights
are gathered for its passes. What leaves the training, as checkpoints, files and images, is gathered whole on the main process, so that
it does not depend on the number of processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.distributed
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.trainable import TrainableUNet

SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""Of the UNet: all but a few of its weights lie in them, and each is small beside the whole."""


class ShardedUNet(TrainableUNet):
    """The UNet itself, divided among the processes by `to`.

    `unet` is the divided one, which can be called only by all processes together; on the main process, while `summon_full_params` runs, it is a
    whole one.
    """

    def __init__(self, unet: UNet2DConditionModel, reshard_after_forward: bool) -> None:
        super().__init__(unet)
        self._reshard_after_forward = reshard_after_forward

    def to(self, device: torch.device) -> Self:
        """Divide the UNet, block by block, each part on its process's device. Raises UserError where there is but one process."""
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes == 1:
            raise UserError(
                "config.json: fsdp_enable divides the UNet among several processes, but there is one. Choose a hardware profile with "
                "more devices, or write false"
            )
        how: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (processes,)),
            "reshard_after_forward": self._reshard_after_forward,
        }
        for module in self.module.modules():
            if type(module).__name__ in SHARDED_BLOCKS:
                fully_shard(module, **how)
        fully_shard(self.module, **how)
        self.parameters = dict(self.module.named_parameters())
        return self

    @property
    def export_is_exact(self) -> bool:
        """All of them are trained."""
        return True

    def prepared(self, accelerator: Accelerator) -> nn.Module:
        """With autocast, and without the copy on each process that accelerate would make."""
        module: nn.Module = accelerator.prepare_model(self.module, evaluation_mode=True)
        return module

    @contextmanager
    def summon_full_params(self, device: torch.device) -> Iterator[None]:
        """Have `unet` whole on `device`, on the main process. To be entered by all processes together."""
        keeps = torch.distributed.get_rank() == 0
        weights = {
            name: _full_tensor(parameter, keeps, device) for name, parameter in self.parameters.items()
        }
        divided = self.unet
        if keeps:
            self.unet = _unet_of(divided, weights)
        del weights
        try:
            yield
        finally:
            self.unet = divided

    def full_state_dict(self) -> dict[str, Tensor]:
        """`parameters` as a checkpoint holds them; on the main process, while `summon_full_params` runs."""
        return {name: parameter.detach() for name, parameter in self.unet.named_parameters()}

    def full_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state with whole tensors on the main process. To be called by all processes together."""
        keeps = torch.distributed.get_rank() == 0
        cpu = torch.device("cpu")
        values = {
            index: {name: _full_tensor(value, keeps, cpu) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {**state, "state": values}

    def shard_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part of a whole optimizer state that is this process's own."""
        parameters = list(self.parameters.values())
        values = {
            index: {name: shard_like(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {**state, "state": values}


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Of a tensor shaped like a divided parameter what is this process's own; anything else as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    # without a source: every process has read the same file
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def to_full_tensor(value: Tensor) -> Tensor:
    """A number of all processes together, such as a norm, as an ordinary tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _full_tensor(value: Any, keeps: bool, device: torch.device) -> Any:
    """A tensor gathered from all processes, for the one that keeps it; an empty one for the others."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.to(device, copy=True) if keeps else torch.empty(0)


def _unet_of(divided: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(divided.config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)
