"""Hardware profiles and their detection.

A profile gives the training settings that depend on the machine. config.json overrides a profile, which overrides the defaults (see
`sdxl_pipeline.config.resolve`). Torch is imported only inside `probe`, which `detect` runs in a child process: a process that only
detects the GPU must not hold a CUDA context, whose memory the training needs.
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

# A card sold as "24 GB" reports between 22.0 and 24.0 GiB, an "80 GB" one between 79 and 80 GiB, so the thresholds are well below.
LARGE_CARD_BYTES = 60 * GIB
MEDIUM_CARD_BYTES = 20 * GIB

# On Linux one of these exists if a driver for a torch device is loaded (dxg: WSL).
DEVICE_NODES = (Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))

PROBE_TIMEOUT_SECONDS = 120


class HardwareError(Exception):
    """A hardware profile that does not exist or cannot be used on this machine; the message contains what to write instead."""


class Hardware(BaseModel):
    """Device, precision and batch sizes of one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    profile: str = Field(description="Name of the preset of these values.")
    device: Device = Field(
        description="Torch device. ROCm cards are `cuda` too: PyTorch's ROCm build uses that name."
    )
    num_processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Training processes on this machine, one per device; more than 1 are started by torchrun.",
    )
    mixed_precision: MixedPrecision = Field(description="Autocast dtype of training and inference.")
    gradient_checkpointing: bool = Field(
        description="Recompute activations in the backward pass: slower, several times less activation memory."
    )
    attention_mechanism: AttentionMechanism = Field(
        default="diffusers",
        description="Attention kernel; `diffusers` is PyTorch's scaled_dot_product_attention.",
    )
    vae_batch_size: int = Field(ge=1, description="Images per VAE forward when latents are encoded.")
    text_encoder_batch_size: int = Field(ge=1, description="Captions per text-encoder forward.")
    base_model_precision: BaseModelPrecision = Field(
        default="no_change",
        description="Quantization of the frozen UNet's weights; all but no_change need the extra `quantization`.",
    )
    text_encoder_1_precision: BaseModelPrecision = Field(
        default="no_change", description="Quantization of the first text encoder while captions are encoded."
    )
    text_encoder_2_precision: BaseModelPrecision = Field(
        default="no_change", description="Quantization of the second text encoder while captions are encoded."
    )
    vae_dtype: VaeDtype = Field(description="Dtype of the VAE; SDXL's VAE overflows in fp16.")
    cpu_threads: int | None = Field(
        default=None,
        ge=1,
        description="Torch's intra-op threads; None: torch's default, one per physical core.",
    )

    @property
    def text_dtype(self) -> Literal["fp32", "bf16", "fp16"]:
        """Return the dtype of caption encoding: that of the training, where "no" means fp32."""
        return "fp32" if self.mixed_precision == "no" else self.mixed_precision

    @property
    def text_precision(self) -> str:
        """Return `text_dtype`, and the encoders' quantization if any: what an embedding depends on beside the caption and the encoders."""
        quantization = (self.text_encoder_1_precision, self.text_encoder_2_precision)
        return (
            self.text_dtype
            if set(quantization) == {"no_change"}
            else "+".join((self.text_dtype, *quantization))
        )

    @model_validator(mode="after")
    def _require_valid_combination(self) -> Self:
        if self.device == "mps" and self.num_processes > 1:
            raise ValueError(
                "num_processes must be 1 on device 'mps': Apple silicon has one GPU and no collective backend"
            )
        for key in ("base_model_precision", "text_encoder_1_precision", "text_encoder_2_precision"):
            if self.device == "mps" and getattr(self, key).startswith(("fp8", "nf4")):
                raise ValueError(
                    f"{key} {getattr(self, key)!r} is not available on device 'mps', which has no 8-bit floats; write 'int8-quanto'"
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
        # fp32 throughout: most CPUs have no bf16 units, so bf16 autocast adds casts without a speed-up, and fp32 makes a resumed run
        # bitwise equal to an uninterrupted one. Small encode batches fit the CPU cache.
        Hardware(
            profile="cpu",
            device="cpu",
            mixed_precision="no",
            gradient_checkpointing=False,
            vae_batch_size=4,
            text_encoder_batch_size=16,
            vae_dtype="fp32",
        ),
        # No autocast: on MPS it supports few operators, with little speed-up for the loss of precision. The GPU shares memory with
        # the system, hence checkpointing and small batches.
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
        # them. Larger batches need base_model_precision int8-quanto, which needs an extra and so is not the default.
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
        # Enough memory for all activations, and for an fp32 VAE, which avoids bf16 rounding of the latents.
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
    """Return the preset of this name, or the result of `detect` for "auto". Raise HardwareError for any other name."""
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
    """Return the preset for this machine, with one process per visible GPU. Torch is not imported into this process.

    Raise HardwareError if there is a device but the child process that imports torch fails.
    """
    if sys.platform == "linux" and not any(node.exists() for node in DEVICE_NODES):
        return PRESETS["cpu"]
    try:
        result = subprocess.run(
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
            f"torch did not detect the device within {PROBE_TIMEOUT_SECONDS} s; set SDXL_HARDWARE to the name of a profile"
        ) from error
    except subprocess.CalledProcessError as error:
        raise HardwareError(
            f"torch failed to detect the device; set SDXL_HARDWARE to the name of a profile. Error:\n{error.stderr.strip()}"
        ) from error
    return Hardware.model_validate(json.loads(result.stdout.strip().splitlines()[-1]))


def probe() -> Hardware:
    """Return the preset for the devices that torch detects in this process (CUDA_VISIBLE_DEVICES and the like apply)."""
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        smallest = min(card.total_memory for card in cards)
        changes: dict[str, Any] = {"num_processes": len(cards)}
        # NVIDIA GPUs have bf16 units from compute capability 8.0 (Ampere) on; on older ones torch emulates bf16 slowly.
        if torch.version.hip is None and min(card.major for card in cards) < 8:
            changes |= {"mixed_precision": "fp16", "vae_dtype": "fp32"}
        return _changed(PRESETS[_preset_for(smallest, rocm=torch.version.hip is not None)], changes)
    if torch.backends.mps.is_available():
        return PRESETS["apple-silicon"]
    return PRESETS["cpu"]


def _preset_for(memory: int, rocm: bool) -> str:
    """Return the name of the preset for a GPU with `memory` bytes. A ROCm GPU smaller than the MI300X uses the CUDA preset."""
    if memory >= LARGE_CARD_BYTES:
        return "rocm-mi300x" if rocm else "cuda-80gb"
    return "cuda-24gb" if memory >= MEDIUM_CARD_BYTES else "cuda-12gb"


def _changed(hardware: Hardware, changes: dict[str, Any]) -> Hardware:
    """Return a validated copy with some fields replaced (pydantic's `model_copy` does not validate)."""
    return Hardware.model_validate(hardware.model_dump() | changes)
