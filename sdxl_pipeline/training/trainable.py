"""Everything that one run trains, as one value: its parameters by name, and its files as users load them."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import UNet2DConditionModel
from torch.nn import Parameter

from sdxl_pipeline.protocol.specs import TrainSpec, WeightsKind
from sdxl_pipeline.sdxl.adapters import UNET, adapted_module_names, save_adapter
from sdxl_pipeline.training.unet import full_unet, trainable_unet


class Trainable(ABC):
    """What is trained. `parameters` are those that ask for gradients, in the order of the optimizer."""

    kind: ClassVar[WeightsKind]
    weights_name: ClassVar[str]
    """The name that `write` is given in a run's folder and in its checkpoints."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.parameters: dict[str, Parameter] = {
            name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad
        }

    @property
    def module(self) -> torch.nn.Module:
        """What a step calls, as it calls the UNet; to be prepared for data parallelism."""
        return self.unet

    def to(self, device: torch.device) -> Self:
        """Move everything, in place."""
        self.module.to(device)
        return self

    @property
    def holds_parameters(self) -> bool:
        """Whether `write` makes a folder of safetensors that hold `parameters`, and nothing else, by name and bit for bit."""
        return False

    @property
    @abstractmethod
    def changed_modules(self) -> int:
        """How many layers are trained or have an adapter."""

    @abstractmethod
    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the weights to `path` as users load them, whole or not at all; the same weights give the same bytes."""


class TrainableLora(Trainable):
    """An adapter on the UNet."""

    kind = "lora"
    weights_name = "pytorch_lora_weights.safetensors"

    @property
    def changed_modules(self) -> int:
        """How many layers have an adapter."""
        return len(adapted_module_names(self.unet))

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the file that `load_lora_weights` reads."""
        save_adapter({UNET: self.unet}, path, metadata)


class TrainableUNet(Trainable):
    """The UNet itself."""

    kind = "unet"
    weights_name = "unet"

    @property
    def holds_parameters(self) -> bool:
        """Unless some are frozen."""
        return self.parameters.keys() == self.unet.state_dict().keys()

    @property
    def changed_modules(self) -> int:
        """How many layers have a weight that is trained."""
        return len({name.rpartition(".")[0] for name in self.parameters})

    def write(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the folder that `UNet2DConditionModel.from_pretrained` reads, in shards as diffusers has them, replacing an older one.

        Its files hold nothing but weights and architecture, so `metadata` has no place in them.
        """
        unfinished = path.with_name(f".{path.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        # where the base model lies must not be published with what became of it
        self.unet.register_to_config(_name_or_path="")
        self.unet.save_pretrained(unfinished, safe_serialization=True)
        shutil.rmtree(path, ignore_errors=True)
        unfinished.rename(path)


def build_trainable(spec: TrainSpec) -> Trainable:
    """What the settings say is trained, on the CPU. Raises StageError for settings that the model or this machine cannot do."""
    if spec.settings.model_type == "full":
        return TrainableUNet(full_unet(spec))
    return TrainableLora(trainable_unet(spec))
