"""Deterministic torchao optimizers, whose steps a resumed run repeats bit for bit. Import it only if torchao is installed."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torchao.optim.adam import _AdamW

from sdxl_pipeline.training.rng import derive_seed

_SECOND_MOMENT = "exp_avg_sq"


class StochasticAdamW(_AdamW):
    """AdamW over bf16 parameters with stochastic rounding, so that on average no update is lost, however small.

    The mean of the squared gradients is float32: with beta2 = 0.999 it changes by at most a thousandth of itself per step, while adjacent
    bf16 values differ by 1/256. The mean of the gradients is bf16.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, bf16_stochastic_round=True)
        self._second_moments: dict[int, dict[str, Tensor]] = {}
        # load_state_dict casts floating-point state to its parameter's dtype
        self.register_load_state_dict_pre_hook(_save_second_moments)
        self.register_load_state_dict_post_hook(_restore_second_moments)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        return torch.zeros_like(p, dtype=p.dtype if signed else torch.float32)


def make_deterministic(optimizer: Optimizer, seed: int) -> None:
    """Seed the stochastic rounding of every step, identically on all processes, and compile the update only on a GPU.

    torchao uses torch's global generator and compiles the update. On a CPU compiling takes minutes and a C++ compiler, and gains little on
    an adapter's parameters, so the same code runs uncompiled there.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    on_cpu = parameter.device.type == "cpu"
    step = optimizer.step

    def seeded_step(self: Optimizer, closure: None = None) -> None:
        steps = self.state[parameter].get("step", 0)  # on the CPU in torchao
        torch.manual_seed(derive_seed(seed, "rounding", int(steps)))
        if on_cpu:
            with torch.compiler.set_stance("force_eager"):
                step(closure)
        else:
            step(closure)

    optimizer.step = MethodType(seeded_step, optimizer)  # type: ignore[method-assign]


def _save_second_moments(optimizer: Optimizer, state: dict[str, Any]) -> None:
    assert isinstance(optimizer, StochasticAdamW)
    optimizer._second_moments = {
        index: {name: tensor for name, tensor in entries.items() if name.endswith(_SECOND_MOMENT)}
        for index, entries in state["state"].items()
    }


def _restore_second_moments(optimizer: Optimizer) -> None:
    assert isinstance(optimizer, StochasticAdamW)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in optimizer._second_moments.items():
        for name, tensor in entries.items():
            optimizer.state[parameters[index]][name] = tensor.to(parameters[index].device, torch.float32)
    optimizer._second_moments = {}
