"""The mutable state of the UNet's training, with save and load."""

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.tiny_sdxl.budget import update_average


class UNetState:
    """The UNet, the average of its weights, AdamW and its moments, steps done and seconds spent."""

    def __init__(self, unet: UNet2DConditionModel, rate: float, decay: float) -> None:
        self.unet = unet
        self.parameters: list[Tensor] = list(unet.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        self._decay = decay

    def update(self) -> None:
        """Take an optimizer step with the current gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_average(self.average, [p.detach() for p in self.parameters], self.step, self._decay)
        self.step += 1

    @torch.no_grad()
    def save_average(self, folder: Path) -> None:
        """Write the averaged weights in diffusers' layout."""
        current = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        self.unet.save_pretrained(folder)
        torch._foreach_copy_(self.parameters, current)

    def save(self, file: Path) -> None:
        """Write the state to `file`, by rename."""
        tensors = {"step": torch.tensor([self.step]), "seconds": torch.tensor([self.seconds])}
        for i, (parameter, mean) in enumerate(zip(self.parameters, self.average, strict=True)):
            moments = self.optimizer.state[parameter]
            tensors |= {f"{i}.weight": parameter.detach().contiguous(), f"{i}.average": mean.contiguous()}
            tensors |= {f"{i}.exp_avg": moments["exp_avg"], f"{i}.exp_avg_sq": moments["exp_avg_sq"]}
        beside = file.with_suffix(".partial")
        save_file(tensors, beside)
        beside.replace(file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Load the state from `file`."""
        tensors = load_file(file)
        self.step, self.seconds = int(tensors["step"].item()), tensors["seconds"].item()
        for i, parameter in enumerate(self.parameters):
            parameter.copy_(tensors[f"{i}.weight"])
            self.average[i].copy_(tensors[f"{i}.average"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"{i}.exp_avg"].clone(),
                "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].clone(),
            }
