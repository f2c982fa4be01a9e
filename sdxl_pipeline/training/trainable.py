"""What a run trains: its parameters by name, and its files in the formats that users load."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from sdxl_pipeline.models.adapters.adapter import UNET, adapted_module_names, save_adapter
from sdxl_pipeline.models.components import TextEncoders
from sdxl_pipeline.runtime.specs import WeightsKind
from sdxl_pipeline.training.text_encoder_training import (
    OnlineTextEncoder,
    UNetWithTextEncoders,
    named_encoders,
)


class Trainable(ABC):
    """A trained model. `parameters` are those that require gradients, in the optimizer's order.

    `module` has the call signature of the UNet and is what a training step calls, after `prepare`.
    """

    kind: ClassVar[WeightsKind]
    weights_name: ClassVar[str]
    """Name of the weights in a run's folder and in its checkpoints."""

    online_text_encoder: OnlineTextEncoder | None = None
    """Encodes captions and prompts while the text encoders are trained; None if they are not."""
    encoders: tuple[nn.Module, ...] = ()
    """The trained text encoders."""

    def __init__(self, unet: UNet2DConditionModel, module: nn.Module) -> None:
        self.unet, self.module = unet, module
        self.parameters: dict[str, Parameter] = {
            name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad
        }

    @property
    def unet_parameters(self) -> list[Parameter]:
        """Return the trained parameters of the UNet."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @property
    def text_parameters(self) -> list[Parameter]:
        """Return the trained parameters of the text encoders, which follow those of the UNet."""
        return [p for encoder in self.encoders for p in encoder.parameters() if p.requires_grad]

    def to(self, device: torch.device) -> Self:
        """Move all modules to `device`, in place, and return self."""
        self.module.to(device)
        return self

    def prepare(self, accelerator: Accelerator) -> nn.Module:
        """Return `module` prepared for the accelerator's processes.

        Frozen parameters are excluded from the broadcast at construction: all processes load the same, and quantized ones cannot be sent.
        """
        frozen = [name for name, parameter in self.module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.module, frozen)
        module: nn.Module = accelerator.prepare(self.module)
        return module

    @contextmanager
    def summon_full_params(self, device: torch.device) -> Iterator[None]:
        """Make `unet` the full UNet on `device`, at least on the main process. All processes must enter it together."""
        yield

    def full_state_dict(self) -> dict[str, Tensor]:
        """Return `parameters` for a checkpoint. For the main process, inside `summon_full_params`."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def full_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the optimizer's state for a checkpoint. All processes must call it together."""
        return state

    def shard_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return this process's shard of a checkpoint's optimizer state."""
        return state

    @property
    def export_is_exact(self) -> bool:
        """Return whether `write` makes a folder of safetensors with exactly `parameters`, by name and bit for bit."""
        return False

    @property
    def export_bytes(self) -> int:
        """Return the size of what `write` writes, within a few kilobytes. For the main process, inside `summon_full_params`."""
        return sum(tensor.nbytes for tensor in self.full_state_dict().values())

    @property
    @abstractmethod
    def num_trained_modules(self) -> int:
        """Return the number of layers that are trained or have an adapter."""

    @abstractmethod
    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights atomically to `path` in the format that users load; the same weights give the same bytes."""


class TrainableLora(Trainable):
    """An adapter on the UNet, and on the text encoders if given."""

    kind = "lora"
    weights_name = "pytorch_lora_weights.safetensors"

    def __init__(
        self, unet: UNet2DConditionModel, encoders: TextEncoders | None = None, windows: int = 1
    ) -> None:
        super().__init__(unet, unet if encoders is None else UNetWithTextEncoders(unet, encoders))
        self._models: dict[str, nn.Module] = {UNET: unet}
        if encoders is not None:
            self._models |= named_encoders(encoders)
            self.encoders = tuple(named_encoders(encoders).values())
            self.online_text_encoder = OnlineTextEncoder(encoders, windows)

    @property
    def num_trained_modules(self) -> int:
        """Return the number of layers with an adapter."""
        return sum(len(adapted_module_names(model)) for model in self._models.values())

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file that diffusers' `load_lora_weights` reads, or for a LyCORIS adapter lycoris-lora."""
        save_adapter(self._models, path, metadata)


class TrainableUNet(Trainable):
    """The full UNet."""

    kind = "unet"
    weights_name = "unet"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet, unet)

    @property
    def export_is_exact(self) -> bool:
        """Return whether no parameter is frozen."""
        return self.parameters.keys() == self.unet.state_dict().keys()

    @property
    def export_bytes(self) -> int:
        """Return the size of what `write` writes: all weights, frozen ones included."""
        return sum(tensor.nbytes for tensor in self.unet.state_dict().values())

    @property
    def num_trained_modules(self) -> int:
        """Return the number of layers with a trained weight."""
        return len({name.rpartition(".")[0] for name in self.parameters})

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the folder that `UNet2DConditionModel.from_pretrained` reads, in diffusers' shards, replacing an existing one.

        `metadata` is not written, because the files hold only weights and architecture.
        """
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        # the path of the base model must not be published with the weights
        self.unet.register_to_config(_name_or_path="")
        self.unet.save_pretrained(unfinished, safe_serialization=True)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
