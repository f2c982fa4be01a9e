"""Dtypes by their settings names, and quantization of frozen models."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Settings names (`mixed_precision`, `vae_dtype`) -> dtypes; `no` is mixed precision's name for fp32."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The first and last convolutions are small, and affect every pixel.
_UNQUANTIZED = ("conv_in", "conv_out")
_QUANTO = {
    "int8-quanto": "qint8",
    "int4-quanto": "qint4",
    "int2-quanto": "qint2",
    "fp8-quanto": "qfloat8",
    "fp8uz-quanto": "qfloat8_e4m3fnuz",
}
_TORCHAO = {"int8-torchao": "Int8WeightOnlyConfig", "fp8wo-torchao": "Float8WeightOnlyConfig"}
_REPACK_ATTRIBUTE = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' layers: on such a CPU they repack their weights in eval mode, irreversibly and without gradient support."""


class PrecisionError(Exception):
    """A precision is unknown or its package is missing. The message gives the setting and a fix."""


def dtype_from_name(name: str) -> torch.dtype:
    """Return the dtype of a settings name. Raises PrecisionError for an unknown name."""
    try:
        return DTYPES[name]
    except KeyError:
        raise PrecisionError(f"{name!r} is not a precision. Set one of {', '.join(DTYPES)}.") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the settings name of a dtype: fp32, bf16 or fp16."""
    return _NAMES[dtype]


def quantize_model(model: nn.Module, precision: str, key: str = "base_model_precision") -> None:
    """Quantize the weights of a frozen UNet or text encoder in place; call it before adding an adapter.

    `no_change` leaves them as they are. All others store the weights of linear layers in 8, 4 or 2 bits with a scale per output channel
    or group, and compute in the dtype they were loaded in: gradients propagate to earlier layers, and none is computed for the weights.
    Quanto includes convolutions, except a UNet's first and last. Raises PrecisionError with the setting `key` when the package is
    missing, or for an unknown name.
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
        raise PrecisionError(f"{key} is {precision!r}. Set one of {known}.")
    try:
        quantize(model, precision)
    except ImportError as error:
        raise PrecisionError(
            f"{key} {precision} needs a package that is not installed ({error.name}): pip install 'sdxl-pipeline[quantization]', "
            f"or set {key} to no_change."
        ) from error


def _quantize_with_quanto(model: nn.Module, precision: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, _QUANTO[precision]), exclude=list(_UNQUANTIZED))
    quanto.freeze(model)
    for module in model.modules():
        if isinstance(module, quanto.nn.QLinear):
            module.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # torch's int8 CPU kernel rejects strided rows, which a batch of one image can have
    return (inputs[0].contiguous(), *inputs[1:])


def _quantize_with_torchao(model: nn.Module, precision: str) -> None:
    from torchao.quantization import quant_api

    config = getattr(quant_api, _TORCHAO[precision])()
    quant_api.quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear))


def _quantize_with_bitsandbytes(model: nn.Module, precision: str) -> None:
    """Quantize to 4-bit normal floats with 8-bit scales (Dettmers et al. 2023), QLoRA's storage."""
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
        if not hasattr(replaced, _REPACK_ATTRIBUTE):
            raise PrecisionError(
                f"nf4-bnb: layers of bitsandbytes {__version__} have no {_REPACK_ATTRIBUTE}, without which sampling or the eval loss may leave "
                "weights without gradient support. Install bitsandbytes 0.50, or set int8-quanto."
            )
        setattr(replaced, _REPACK_ATTRIBUTE, False)
        return replaced.requires_grad_(False)

    _replace_linear(model, quantized)


def _replace_linear(model: nn.Module, replacement: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, replacement(child))
        else:
            _replace_linear(child, replacement)
