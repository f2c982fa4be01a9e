"""A full UNet sharded over the processes: each holds a part of every weight, its gradient and its optimizer state (FSDP2, ZeRO-3).

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"; torch's `fully_shard`. The weights of a
block are gathered for its forward and backward passes. Checkpoints, exported files and validation images use full weights, gathered on
the main process, so they do not depend on the number of processes.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
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

TIMEOUT = timedelta(days=7)
"""How long a process waits for the others: the main process may generate images, evaluate, or wait for disk space."""


class CpuGroup:
    """A gloo group of all processes, created after the accelerator; with one process every operation is local."""

    def __init__(self, num_processes: int) -> None:
        self._group = (
            torch.distributed.new_group(backend="gloo", timeout=TIMEOUT) if num_processes > 1 else None
        )

    def all_reduce_any(self, *flags: bool) -> list[bool]:
        """Return which flags are set on any process: the same result everywhere, so that all processes leave the loop together."""
        if self._group is None:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return [bool(flag) for flag in values.tolist()]

    def barrier(self) -> None:
        """Wait for all other processes on the host, since a device barrier would time out."""
        if self._group is not None:
            torch.distributed.barrier(group=self._group)


SHARDED_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
"""The UNet blocks that are sharded separately: they contain nearly all weights, and each is small compared to the UNet."""


class ShardedUNet(TrainableUNet):
    """The UNet, sharded over the processes by `to`.

    `unet` is the sharded model, which all processes must call together; on the main process, within `summon_full_params`, it is a full one.
    """

    def __init__(self, unet: UNet2DConditionModel, reshard_after_forward: bool) -> None:
        super().__init__(unet)
        self._reshard_after_forward = reshard_after_forward

    def to(self, device: torch.device) -> Self:
        """Shard the UNet block by block, each shard on its process's device. Raises UserError with a single process."""
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes == 1:
            raise UserError(
                "config.json: fsdp_enable shards the UNet over several processes, but there is one. Choose a hardware profile with "
                "more devices, or set it to false"
            )
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device.type, (processes,)),
            "reshard_after_forward": self._reshard_after_forward,
        }
        for module in self.module.modules():
            if type(module).__name__ in SHARDED_BLOCKS:
                fully_shard(module, **options)
        fully_shard(self.module, **options)
        self.parameters = dict(self.module.named_parameters())
        return self

    @property
    def export_is_exact(self) -> bool:
        """Return True: all parameters are trained."""
        return True

    def prepare(self, accelerator: Accelerator) -> nn.Module:
        """Return the module with autocast, without the data-parallel replica that accelerate would create."""
        module: nn.Module = accelerator.prepare_model(self.module, evaluation_mode=True)
        return module

    @contextmanager
    def summon_full_params(self, device: torch.device) -> Iterator[None]:
        """Make `unet` a full model on `device`, on the main process. All processes must enter it together."""
        is_main = torch.distributed.get_rank() == 0
        weights = {
            name: _full_tensor(parameter, is_main, device) for name, parameter in self.parameters.items()
        }
        sharded = self.unet
        if is_main:
            self.unet = _build_unet(sharded, weights)
        del weights
        try:
            yield
        finally:
            self.unet = sharded

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return the full `parameters` for a checkpoint; on the main process, within `summon_full_params`."""
        return {name: parameter.detach() for name, parameter in self.unet.named_parameters()}

    def full_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return an optimizer's state with full tensors on the main process. All processes must call it together."""
        is_main = torch.distributed.get_rank() == 0
        cpu = torch.device("cpu")
        values = {
            index: {name: _full_tensor(value, is_main, cpu) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {**state, "state": values}

    def shard_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return this process's shard of a full optimizer state."""
        parameters = list(self.parameters.values())
        values = {
            index: {name: shard_like(value, parameters[index]) for name, value in entries.items()}
            for index, entries in state["state"].items()
        }
        return {**state, "state": values}


def shard_like(value: Any, parameter: Tensor) -> Any:
    """Return this process's shard of a tensor that has the shape of a sharded parameter; anything else unchanged."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    # no source rank: every process has read the same file
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def to_full_tensor(value: Tensor) -> Tensor:
    """Return a distributed number, such as a norm, as an ordinary tensor."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _full_tensor(value: Any, is_main: bool, device: torch.device) -> Any:
    """Return a tensor gathered from all processes if `is_main`, otherwise an empty one."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.to(device, copy=True) if is_main else torch.empty(0)


def _build_unet(sharded: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(sharded.config)
    unet.load_state_dict(weights, assign=True)
    return unet.eval().requires_grad_(False)
