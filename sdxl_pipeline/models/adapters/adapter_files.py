"""Headers and names of adapter files of all kinds. No torch."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open

UNET: Final = "unet"
PREFIXES: Final = (UNET, "text_encoder", "text_encoder_2")
"""Diffusers' prefixes of a file's tensors, by model."""

AdapterKind = Literal["lora", "dora", "lycoris"]

_SUFFIX: Final = ".safetensors"
_LYCORIS_PARTS = (".lokr_", ".hada_")
_FACTORS = (".lora_A", ".lora_B", ".lora_up", ".lora_down", ".lora_mid", *_LYCORIS_PARTS)


class AdapterError(Exception):
    """An adapter cannot be added or loaded. The message says why."""


@dataclass(frozen=True)
class AdapterFile:
    """Tensor names and metadata of a safetensors file."""

    path: Path
    names: frozenset[str]
    metadata: Mapping[str, str]

    @property
    def kind(self) -> AdapterKind:
        """Kind of adapter: LyCORIS' own format, or a LoRA or DoRA (a LoRA with norms) that diffusers reads."""
        if any(
            name.startswith("lycoris_") or any(part in name for part in _LYCORIS_PARTS) for name in self.names
        ):
            return "lycoris"
        if any("lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in self.names):
            return "dora"
        return "lora"


def read_header(path: Path) -> AdapterFile:
    """Return the header of a weights file. Raises AdapterError if it is missing or not a safetensors file."""
    if path.suffix.lower() != _SUFFIX:
        raise AdapterError(
            f"{path} is not a .safetensors file. Other formats are not read: they could run code."
        )
    try:
        with safe_open(path, framework="numpy") as file:  # no torch for a header
            return AdapterFile(path, frozenset(file.keys()), file.metadata() or {})
    except FileNotFoundError as error:
        raise AdapterError(f"{path} does not exist.") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error


@contextmanager
def lower_case_suffix(path: Path) -> Iterator[Path]:
    """Yield a path whose suffix diffusers accepts as safetensors: it compares case-sensitively, and unpickles any other suffix."""
    if path.suffix == _SUFFIX:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, path.stem + _SUFFIX)
        link.symlink_to(path.resolve())
        yield link


def has_nonzero_update(tensors: Mapping[str, Any]) -> bool:
    """Return whether some layer's update is nonzero: the product of its factors is nonzero if every factor is."""
    factors: defaultdict[str, list[bool]] = defaultdict(list)
    for name, tensor in tensors.items():
        if part := next((part for part in _FACTORS if part in name), None):
            factors[name.rpartition(part)[0]].append(bool(tensor.any()))
    return any(map(all, factors.values()))


def display_name(prefix: str) -> str:
    """Return the display name of a prefix's model."""
    return "UNet" if prefix == UNET else prefix.replace("_", " ")
