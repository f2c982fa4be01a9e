"""Everything that one run trains, as one value: its parameters by name, and its files as users load them."""

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
    """What is trained. `parameters` are those that ask for gradients, in the order of the optimizer.

    `module` is what a step calls, as it calls the UNet; to be prepared for data parallelism.
    """

    kind: ClassVar[WeightsKind]
    weights_name: ClassVar[str]
    """The name that `write` is given in a run's folder and in its checkpoints."""

    online_text_encoder: OnlineTextEncoder | None = None
    """How captions and prompts are encoded while the text encoders are trained; None where they are not."""
    encoders: tuple[nn.Module, ...] = ()
    """The text encoders that are trained."""

    def __init__(self, unet: UNet2DConditionModel, module: nn.Module) -> None:
        self.unet, self.module = unet, module
        self.parameters: dict[str, Parameter] = {
            name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad
        }

    @property
    def unet_parameters(self) -> list[Parameter]:
        """Those of the UNet."""
        return [parameter for parameter in self.unet.parameters() if parameter.requires_grad]

    @property
    def text_parameters(self) -> list[Parameter]:
        """Those of the text encoders; they come after the UNet's."""
        return [each for encoder in self.encoders for each in encoder.parameters() if each.requires_grad]

    def to(self, device: torch.device) -> Self:
        """Move everything, in place."""
        self.module.to(device)
        return self

    def prepared(self, accelerator: Accelerator) -> nn.Module:
        """`module` as the steps call it, ready for several processes.

        What is frozen is left out of what they tell each other: all have loaded the same, and weights in few bits cannot be sent.
        """
        frozen = [name for name, parameter in self.module.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self.module, frozen)
        module: nn.Module = accelerator.prepare(self.module)
        return module

    @contextmanager
    def summon_full_params(self, device: torch.device) -> Iterator[None]:
        """Have `unet` whole, on the main process at least, to be drawn with or written. To be entered by all processes together."""
        yield

    def full_state_dict(self) -> dict[str, Tensor]:
        """`parameters` as a checkpoint holds them; on the main process, while `summon_full_params` runs."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def full_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state of the optimizer as a checkpoint holds it. To be called by all processes together."""
        return state

    def shard_optimizer_state_dict(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a checkpoint's optimizer state is this process's own."""
        return state

    @property
    def export_is_exact(self) -> bool:
        """Whether `write` makes a folder of safetensors that hold `parameters`, and nothing else, by name and bit for bit."""
        return False

    @property
    def written_bytes(self) -> int:
        """What `write` takes on the disk, but for a few kilobytes; on the main process, while `summon_full_params` runs."""
        return sum(tensor.nbytes for tensor in self.full_state_dict().values())

    @property
    @abstractmethod
    def changed_modules(self) -> int:
        """How many layers are trained or have an adapter."""

    @abstractmethod
    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights to `path` as users load them, whole or not at all; the same weights give the same bytes."""


class TrainableLora(Trainable):
    """An adapter on the UNet, and on the text encoders if these are given."""

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
    def changed_modules(self) -> int:
        """How many layers have an adapter."""
        return sum(len(adapted_module_names(model)) for model in self._models.values())

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file that `load_lora_weights` reads, or of a LyCORIS adapter lycoris-lora."""
        save_adapter(self._models, path, metadata)


class TrainableUNet(Trainable):
    """The UNet itself."""

    kind = "unet"
    weights_name = "unet"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet, unet)

    @property
    def export_is_exact(self) -> bool:
        """Unless some are frozen."""
        return self.parameters.keys() == self.unet.state_dict().keys()

    @property
    def written_bytes(self) -> int:
        """What `write` takes on the disk: all weights, the frozen ones too."""
        return sum(tensor.nbytes for tensor in self.unet.state_dict().values())

    @property
    def changed_modules(self) -> int:
        """How many layers have a weight that is trained."""
        return len({name.rpartition(".")[0] for name in self.parameters})

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the folder that `UNet2DConditionModel.from_pretrained` reads, in shards as diffusers has them, replacing an older one.

        Its files hold nothing but weights and architecture, so `metadata` has no place in them.
        """
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        # where the base model lies must not be published with what became of it
        self.unet.register_to_config(_name_or_path="")
        self.unet.save_pretrained(unfinished, safe_serialization=True)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)
