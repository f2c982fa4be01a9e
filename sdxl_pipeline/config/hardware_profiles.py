"""What the machine is and how hard to drive it: the hardware profiles, and the detection behind `auto`.

A profile fills in those training settings that depend on the machine and not on the images. It stands below config.json and above
the defaults (see `project.precedence`). Torch is imported only inside `probe`, which `detect` runs in a process of its own: a worker
that only wants to know which card there is must not keep a CUDA context on it while the training needs that memory.
"""

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Device = Literal["cpu", "cuda", "mps"]
MixedPrecision = Literal["no", "bf16", "fp16"]
VaeDtype = Literal["bf16", "fp32"]
BaseModelPrecision = Literal[
    "no_change",
    "int8-quanto",
    "int4-quanto",
    "int2-quanto",
    "fp8-quanto",
    "fp8uz-quanto",
    "int8-torchao",
    "fp8wo-torchao",
    "nf4-bnb",
]
AttentionMechanism = Literal["diffusers", "xformers", "flash-attn-2", "flex"]

GIB = 1024**3

# A card sold as "24 GB" reports between 22.0 and 24.0 GiB, an "80 GB" one between 79 and 80 GiB, so the thresholds lie well below.
LARGE_CARD_BYTES = 60 * GIB
MEDIUM_CARD_BYTES = 20 * GIB

# One of these exists on Linux whenever a driver for a device that torch can use is loaded (dxg is WSL's).
DEVICE_NODES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))

PROBE_TIMEOUT_SECONDS = 120


class HardwareError(Exception):
    """A hardware profile that does not exist or cannot be used on this machine; the message says what to write instead."""


class Hardware(BaseModel):
    """One machine as the stages see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(description="Name of the preset these values come from.")
    device: Device = Field(
        description="Torch device. ROCm cards are `cuda` too: PyTorch's ROCm build uses that name."
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Training processes on this machine, one per device; above 1 torchrun starts them.",
    )
    mixed_precision: MixedPrecision = Field(description="Autocast type of the training and the samplers.")
    gradient_checkpointing: bool = Field(
        description="Recompute activations in the backward pass: slower, several times less activation memory."
    )
    attention_mechanism: AttentionMechanism = Field(
        default="diffusers",
        description="Attention kernel: `diffusers` is PyTorch's own scaled_dot_product_attention.",
    )
    vae_batch_size: int = Field(ge=1, description="Images per VAE forward when latents are encoded.")
    text_encoder_batch_size: int = Field(ge=1, description="Captions per text-encoder forward.")
    base_model_precision: BaseModelPrecision = Field(
        default="no_change",
        description="Bits of the frozen UNet's weights; all but no_change need the extra `quantization`.",
    )
    text_encoder_1_precision: BaseModelPrecision = Field(
        default="no_change", description="The same of the first text encoder, while captions are embedded."
    )
    text_encoder_2_precision: BaseModelPrecision = Field(
        default="no_change", description="The same of the second text encoder."
    )
    vae_dtype: VaeDtype = Field(description="SDXL's VAE overflows in fp16, so that is not offered.")
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Torch's intra-op threads; None leaves torch's own choice, one per physical core.",
    )

    @property
    def text_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """Precision that captions are embedded in: that of the training, for which "no" means fp32."""
        return "fp32" if self.mixed_precision == "no" else self.mixed_precision

    @property
    def text_precision(self) -> str:
        """What decides the bits of an embedding beside the caption and the encoders: `text_dtype`, and the encoders' own precisions."""
        own = (self.text_encoder_1_precision, self.text_encoder_2_precision)
        return self.text_dtype if set(own) == {"no_change"} else "+".join((self.text_dtype, *own))

    @model_validator(mode="after")
    def _combination_works(self) -> Self:
        if self.device == "mps" and self.num_processes > 1:
            raise ValueError(
                "num_processes must be 1 on device 'mps': Apple silicon has one GPU and no collective backend"
            )
        for key in ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision"):
            if self.device == "mps" and getattr(self, key).startswith(("fp8", "nf4")):
                raise ValueError(
                    f"{key} {getattr(self, key)!r} cannot be had on device 'mps', which has no 8-bit floats; write 'int8-quanto'"
                )
        if self.device != "cuda" and self.attention_mechanism != "diffusers":
            raise ValueError(
                f"attention_mechanism {self.attention_mechanism!r} has kernels for device 'cuda' only; on {self.device!r} write 'diffusers'"
            )
        if self.device == "cpu" and self.mixed_precision == "fp16":
            raise ValueError(
                "mixed_precision 'fp16' needs a GPU's loss scaling; on device 'cpu' write 'no' or 'bf16'"
            )
        return self


PRESETS: dict[str, Hardware] = {
    preset.profile: preset
    for preset in (
        # fp32 throughout: most CPUs have no bf16 units, where bf16 autocast costs casts and saves nothing; and fp32 on one thread
        # order is what makes a resumed run equal an unbroken one to the byte. Small encode batches keep the working set in cache.
        Hardware(
            profile="cpu",
            device="cpu",
            mixed_precision="no",
            gradient_checkpointing=False,
            vae_batch_size=4,
            text_encoder_batch_size=16,
            vae_dtype="fp32",
        ),
        # No autocast: on MPS it covers few operators and loses more in precision than it gains in speed. Memory is shared with the
        # desktop, hence checkpointing and small batches.
        Hardware(
            profile="apple-silicon",
            device="mps",
            mixed_precision="no",
            gradient_checkpointing=True,
            vae_batch_size=1,
            text_encoder_batch_size=16,
            vae_dtype="fp32",
        ),
        # The UNet's 2.6 G parameters take 5.1 GB in bf16; with checkpointing and cached latents a 1024x1024 batch of 1 fits beside
        # them. For batches above that choose base_model_precision int8-quanto, which needs an extra and so is not the default.
        Hardware(
            profile="cuda-12gb",
            device="cuda",
            mixed_precision="bf16",
            gradient_checkpointing=True,
            vae_batch_size=1,
            text_encoder_batch_size=16,
            vae_dtype="bf16",
        ),
        # Checkpointing stays on: without it a 1024x1024 batch of 4, the default, does not fit.
        Hardware(
            profile="cuda-24gb",
            device="cuda",
            mixed_precision="bf16",
            gradient_checkpointing=True,
            vae_batch_size=4,
            text_encoder_batch_size=64,
            vae_dtype="bf16",
        ),
        # Room for the activations, and for a VAE in fp32, which spares the latents bf16's three decimal digits.
        Hardware(
            profile="cuda-80gb",
            device="cuda",
            mixed_precision="bf16",
            gradient_checkpointing=False,
            vae_batch_size=8,
            text_encoder_batch_size=256,
            vae_dtype="fp32",
        ),
        Hardware(
            profile="rocm-mi300x",
            device="cuda",
            mixed_precision="bf16",
            gradient_checkpointing=False,
            vae_batch_size=16,
            text_encoder_batch_size=256,
            vae_dtype="fp32",
        ),
    )
}


def hardware_from_name(name: str) -> Hardware:
    """The preset of this name, or what `detect` finds for "auto". Raises HardwareError for any other name."""
    if name == "auto":
        return detect()
    if name not in PRESETS:
        known = ", ".join(["auto", *PRESETS])
        raise HardwareError(
            f"hardware profile {name!r} does not exist: set SDXL_HARDWARE, or `profile` of the resource `hardware`, to one of {known}"
        )
    return PRESETS[name]


@lru_cache(maxsize=1)
def detect() -> Hardware:
    """The preset that suits this machine, with one process per visible GPU. Does not import torch into this process.

    Raises HardwareError when a device is there but torch cannot be asked about it.
    """
    if sys.platform == "linux" and not any(node.exists() for node in DEVICE_NODES):
        return PRESETS["cpu"]
    try:
        asked = subprocess.run(
            [
                sys.executable,
                "-c",
                "from sdxl_pipeline.config.hardware_profiles import probe; print(probe().model_dump_json())",
            ],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_SECONDS,
            cwd=Path(__file__).parents[2],
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise HardwareError(
            f"torch did not answer within {PROBE_TIMEOUT_SECONDS} s which device there is; set SDXL_HARDWARE to a profile by name"
        ) from error
    except subprocess.CalledProcessError as error:
        raise HardwareError(
            f"torch could not say which device there is; set SDXL_HARDWARE to a profile by name. Torch said:\n{error.stderr.strip()}"
        ) from error
    return Hardware.model_validate(json.loads(asked.stdout.strip().splitlines()[-1]))


def probe() -> Hardware:
    """The preset that suits what torch sees from this process (CUDA_VISIBLE_DEVICES and its kin are respected)."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        smallest = min(card.total_memory for card in cards)
        changes: dict[str, Any] = {"num_processes": len(cards)}
        # bf16 units came with NVIDIA's compute capability 8.0 (Ampere); before it torch only emulates them, slowly.
        if torch.version.hip is None and min(card.major for card in cards) < 8:
            changes |= {"mixed_precision": "fp16", "vae_dtype": "fp32"}
        return _changed(PRESETS[_preset_for(smallest, rocm=torch.version.hip is not None)], changes)
    if torch.backends.mps.is_available():
        return PRESETS["apple-silicon"]
    return PRESETS["cpu"]


def _preset_for(memory: int, rocm: bool) -> str:
    """Name of the preset for a card of so many bytes. A ROCm card smaller than the MI300X takes the CUDA preset of its size."""
    if memory >= LARGE_CARD_BYTES:
        return "rocm-mi300x" if rocm else "cuda-80gb"
    return "cuda-24gb" if memory >= MEDIUM_CARD_BYTES else "cuda-12gb"


def _changed(hardware: Hardware, changes: dict[str, Any]) -> Hardware:
    """A copy with some fields replaced, validated again (pydantic's own `model_copy` does not validate)."""
    return Hardware.model_validate(hardware.model_dump() | changes)
