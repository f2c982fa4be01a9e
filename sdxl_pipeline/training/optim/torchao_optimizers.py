"""What torchao's optimizers need to take steps that a resumed run repeats to the bit. To be imported only where torchao is installed."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torchao.optim.adam import _AdamW

from sdxl_pipeline.training.rng import derive_seed

_SQUARES = "exp_avg_sq"


class StochasticAdamW(_AdamW):
    """AdamW over bf16 parameters, which are rounded by lot, so that on average no update is lost however small it is.

    The mean of the squared gradients is float32: under beta2 = 0.999 it changes by a thousandth of itself and less, and bf16, whose
    numbers lie a 256th apart, would stop following it. The mean of the gradients is bf16.
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
        self._wide: dict[int, dict[str, Tensor]] = {}
        # torch casts floating state to its parameter's dtype when it is loaded
        self.register_load_state_dict_pre_hook(_keep_squares)
        self.register_load_state_dict_post_hook(_put_squares_back)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        return torch.zeros_like(p, dtype=p.dtype if signed else torch.float32)


def make_repeatable(optimizer: Optimizer, seed: int) -> None:
    """Give the stochastic rounding of every step its own seed, the same on every process, and compile only where there is a GPU.

    torchao draws from torch's global generator and compiles the update. On a CPU compiling takes minutes and a C++ compiler, and gains
    little on the parameters of an adapter, so there the same code runs as it stands.
    """
    parameter = optimizer.param_groups[0]["params"][0]
    on_cpu = parameter.device.type == "cpu"
    step = optimizer.step

    def seeded_step(self: Optimizer, closure: None = None) -> None:
        taken = self.state[parameter].get("step", 0)  # torchao keeps it on the CPU
        torch.manual_seed(derive_seed(seed, "rounding", int(taken)))
        if on_cpu:
            with torch.compiler.set_stance("force_eager"):
                step(closure)
        else:
            step(closure)

    optimizer.step = MethodType(seeded_step, optimizer)  # type: ignore[method-assign]


def _keep_squares(optimizer: Optimizer, state: dict[str, Any]) -> None:
    assert isinstance(optimizer, StochasticAdamW)
    optimizer._wide = {
        index: {name: tensor for name, tensor in entries.items() if name.endswith(_SQUARES)}
        for index, entries in state["state"].items()
    }


def _put_squares_back(optimizer: Optimizer) -> None:
    assert isinstance(optimizer, StochasticAdamW)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, entries in optimizer._wide.items():
        for name, tensor in entries.items():
            optimizer.state[parameters[index]][name] = tensor.to(parameters[index].device, torch.float32)
    optimizer._wide = {}
