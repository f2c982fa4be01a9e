"""Number formats: the names settings use for them, and weights of frozen models in fewer bits."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Settings' names (`mixed_precision`, `vae_dtype`) -> dtypes; `no` is mixed precision's name for fp32."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The first and last convolutions are small, and every pixel goes through them.
_LEFT_WHOLE = ("conv_in", "conv_out")
_QUANTO = {
    "int8-quanto": "qint8",
    "int4-quanto": "qint4",
    "int2-quanto": "qint2",
    "fp8-quanto": "qfloat8",
    "fp8uz-quanto": "qfloat8_e4m3fnuz",
}
_TORCHAO = {"int8-torchao": "Int8WeightOnlyConfig", "fp8wo-torchao": "Float8WeightOnlyConfig"}
_REPACKS = "support_avx512bf16_for_cpu"
"""Of bitsandbytes' layers: on such a CPU, in eval mode, they bring their weights into an order that takes no gradients, for good."""


class PrecisionError(Exception):
    """A precision that cannot be had; the message says which one, and what to do."""


def dtype_from_name(name: str) -> torch.dtype:
    """The dtype of a settings' name. Raises PrecisionError for one that is none."""
    try:
        return DTYPES[name]
    except KeyError:
        raise PrecisionError(f"{name!r} is not a precision. Write one of {', '.join(DTYPES)}.") from None


def dtype_name(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return _NAMES[dtype]


def quantize_model(model: nn.Module, precision: str, key: str = "base_model_precision") -> None:
    """Hold the weights of a frozen UNet or text encoder in fewer bits, in place; to be called before an adapter is added.

    `no_change` leaves it as it is. All others hold the weights of linear layers in 8, 4 or 2 bits with a scale for each output channel
    or group, and compute in the dtype they were loaded in: gradients pass through to what lies before them, and none is made for them.
    Quanto's take in convolutions too, but for a UNet's first and last. Raises PrecisionError, naming the setting `key`, when the
    package is absent, or for an unknown name.
    """
    if precision == "no_change":
        return
    if precision in _QUANTO:
        quantize = _quantize_with_quanto
    elif precision in _TORCHAO:
        quantize = _quantize_with_torchao
    elif precision == "nf4-bnb":
        quantize = _quantize_with_bitsandbytes
    else:
        known = ", ".join(["no_change", *_QUANTO, *_TORCHAO, "nf4-bnb"])
        raise PrecisionError(f"{key} is {precision!r}. Write one of {known}.")
    try:
        quantize(model, precision)
    except ImportError as error:
        raise PrecisionError(
            f"{key} {precision} needs a package that is absent ({error.name}): pip install 'sdxl-pipeline[quantization]', "
            f"or write {key}: no_change."
        ) from error


def _quantize_with_quanto(model: nn.Module, precision: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, _QUANTO[precision]), exclude=list(_LEFT_WHOLE))
    quanto.freeze(model)
    for module in model.modules():
        if isinstance(module, quanto.nn.QLinear):
            module.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # torch's int8 kernel on a CPU refuses strided rows, which a batch of one image can have
    return (inputs[0].contiguous(), *inputs[1:])


def _quantize_with_torchao(model: nn.Module, precision: str) -> None:
    from torchao.quantization import quant_api

    config = getattr(quant_api, _TORCHAO[precision])()
    quant_api.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))


def _quantize_with_bitsandbytes(model: nn.Module, precision: str) -> None:
    """4-bit normal floats, their scales in 8 bits (Dettmers et al. 2023); QLoRA's own storage."""
    from bitsandbytes import __version__
    from bitsandbytes.nn import LinearNF4, Params4bit

    def quantized(layer: nn.Linear) -> nn.Module:
        replaced = LinearNF4(
            layer.in_features, layer.out_features, bias=False, compute_dtype=layer.weight.dtype
        )
        replaced.weight = Params4bit(
            layer.weight.detach(), requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(layer.weight.device)
        replaced.bias = layer.bias
        if not hasattr(replaced, _REPACKS):
            raise PrecisionError(
                f"nf4-bnb: a layer of bitsandbytes {__version__} has no {_REPACKS}, without which an image or an eval loss may leave weights "
                "that cannot be trained through. Install bitsandbytes 0.50, or write int8-quanto."
            )
        setattr(replaced, _REPACKS, False)
        return replaced.requires_grad_(False)

    _replace_linear(model, quantized)


def _replace_linear(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, replacement(child))
        else:
            _replace_linear(child, replacement)
