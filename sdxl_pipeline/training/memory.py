"""What a training takes of its device's memory."""

from collections.abc import Iterable

from torch import Tensor


def held_bytes(tensor: Tensor) -> int:
    """What a tensor takes, the parts of those that are made of others included (quanto's, torchao's and bitsandbytes')."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return sum(held_bytes(getattr(tensor, name)) for name in names)
    return tensor.untyped_storage().nbytes() + _quantization_bytes(getattr(tensor, "quant_state", None))


def _quantization_bytes(state: object) -> int:
    """Of what bitsandbytes keeps beside a weight: its scales, theirs, and the table of its values."""
    if state is None:
        return 0
    parts = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    tensors: Iterable[Tensor] = (part for part in parts if isinstance(part, Tensor))
    return sum(part.nbytes for part in tensors) + _quantization_bytes(getattr(state, "state2", None))
