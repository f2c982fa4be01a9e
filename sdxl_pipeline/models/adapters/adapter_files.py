"""What is common to the files of every kind of adapter, before a tensor of them is read."""

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
"""Of tensors in a file, by the model that they belong to; diffusers' own."""

AdapterKind = Literal["lora", "dora", "lycoris"]

_SUFFIX: Final = ".safetensors"
_LYCORIS_PARTS = (".lokr_", ".hada_")
_FACTORS = (".lora_A", ".lora_B", ".lora_up", ".lora_down", ".lora_mid", *_LYCORIS_PARTS)


class AdapterError(Exception):
    """An adapter that cannot be made or loaded; the message says why."""


@dataclass(frozen=True)
class AdapterFile:
    """What the header of a file tells."""

    path: Path
    names: frozenset[str]
    metadata: Mapping[str, str]

    @property
    def kind(self) -> AdapterKind:
        """LyCORIS' own format, or one that diffusers reads: a LoRA, or a DoRA, which has norms besides."""
        if any(
            name.startswith("lycoris_") or any(part in name for part in _LYCORIS_PARTS) for name in self.names
        ):
            return "lycoris"
        if any("lora_magnitude_vector" in name or name.endswith(".dora_scale") for name in self.names):
            return "dora"
        return "lora"


def read_header(path: Path) -> AdapterFile:
    """The names in a file of weights. Raises AdapterError for one that is absent or no safetensors."""
    if path.suffix.lower() != _SUFFIX:
        raise AdapterError(f"{path} is no .safetensors file. No other format is read: it could run code.")
    try:
        with safe_open(path, framework="numpy") as file:  # no torch for a header
            return AdapterFile(path, frozenset(file.keys()), file.metadata() or {})
    except FileNotFoundError as error:
        raise AdapterError(f"{path} does not exist.") from error
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read as safetensors: {error}") from error


@contextmanager
def lower_case_suffix(path: Path) -> Iterator[Path]:
    """Give a file of weights a name that diffusers takes for safetensors: it compares the suffix's case, and unpickles any other."""
    if path.suffix == _SUFFIX:
        yield path
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, path.stem + _SUFFIX)
        link.symlink_to(path.resolve())
        yield link


def changes_something(tensors: Mapping[str, Any]) -> bool:
    """Whether some layer's update is not zero. An update is a product, and is not zero when none of its factors is."""
    factors: defaultdict[str, list[bool]] = defaultdict(list)
    for name, tensor in tensors.items():
        if part := next((part for part in _FACTORS if part in name), None):
            factors[name.rpartition(part)[0]].append(bool(tensor.any()))
    return any(map(all, factors.values()))


def display_name(prefix: str) -> str:
    """The model of a prefix, for a message."""
    return "UNet" if prefix == UNET else prefix.replace("_", " ")
