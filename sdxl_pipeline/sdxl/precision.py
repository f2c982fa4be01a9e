"""Number formats: the names settings use for them, and 8-bit weights for the frozen UNet."""

import torch
from diffusers import UNet2DConditionModel

DTYPES = {"no": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Settings' names (`mixed_precision`, `vae_dtype`) -> dtypes; `no` is mixed precision's name for fp32."""

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The first and last convolutions are small, and every pixel goes through them.
_LEFT_WHOLE = ("conv_in", "conv_out")


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


def quantize_base_model(unet: UNet2DConditionModel, base_model_precision: str) -> None:
    """Hold the weights of a frozen UNet in fewer bits, in place; to be called before an adapter is added.

    `no_change` leaves it as it is. `int8-quanto` stores the weights of linear and convolution layers as 8-bit integers with a scale
    per output channel (optimum-quanto), but for the first and the last convolution; they are computed in the dtype they were loaded
    in. Raises PrecisionError when the package is absent, or for an unknown name.
    """
    if base_model_precision == "no_change":
        return
    if base_model_precision != "int8-quanto":
        raise PrecisionError(
            f"base_model_precision is {base_model_precision!r}. Write no_change or int8-quanto."
        )
    try:
        from optimum.quanto import freeze, qint8, quantize
    except ImportError as error:
        raise PrecisionError(
            "base_model_precision int8-quanto needs optimum-quanto: pip install 'sdxl-pipeline[quantization]', "
            "or write base_model_precision: no_change."
        ) from error
    quantize(unet, weights=qint8, exclude=list(_LEFT_WHOLE))
    freeze(unet)
