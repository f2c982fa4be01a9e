"""Choice of the files in use from a model folder or Hub listing: one variant of each component, safetensors only.

A repository like stabilityai/stable-diffusion-xl-base-1.0 has the same weights many times: fp32 and fp16 safetensors, a single-file
checkpoint, ONNX, OpenVINO and Flax. fp16 safetensors are preferred for every component: they halve the download (7 GB rather than 14),
and the frozen base model computes in bf16 or fp16 anyway. This concerns only storage: the VAE's fp16 file is loaded to bf16 or fp32, so
the overflow of SDXL's VAE in fp16 *arithmetic* does not occur.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

PREFERRED_VARIANT = "fp16"
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
MODEL_INDEX = "model_index.json"

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model")


class BaseModelError(Exception):
    """The base model cannot be used. The message gives the component, the problem and a fix."""


@dataclass(frozen=True)
class ComponentFiles:
    """Files of one component as paths relative to the model's root, and their variant."""

    config: str
    weights: tuple[str, ...]
    variant: str | None


def choose_component(
    names: Collection[str], component: str, source: str, folder: str | None = None
) -> ComponentFiles:
    """Choose the weights of `component` among the file names of a model.

    `folder` is the component's folder below the root, by default its own name; "" is the root. Raises BaseModelError when there is no
    configuration, or no safetensors file.
    """
    folder = component if folder is None else folder
    prefix = f"{folder}/" if folder else ""
    location = f"`{folder}`" if folder else "its root folder"
    config = f"{prefix}config.json"
    if config not in names:
        raise BaseModelError(
            f"{source}: {config} is missing, so this is not a diffusers folder with a {component}. "
            "Give a diffusers folder, a Hub id of one, or a single .safetensors checkpoint."
        )
    inside = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    for variant in (PREFERRED_VARIANT, None):
        weights = sorted(
            name for name in inside if _weights_pattern(WEIGHT_STEMS[component], variant).match(name)
        )
        if any(name.endswith(".safetensors") for name in weights):
            return ComponentFiles(config, tuple(prefix + name for name in weights), variant)
    if pickled := sorted(name for name in inside if name.endswith(_PICKLES)):
        raise BaseModelError(
            f"{source}: {location} has the {component} only as {', '.join(pickled)}. Such files can run code when they are opened, so "
            "only .safetensors are loaded here. Choose a repository that has them, or convert a copy you trust once: load it with "
            "diffusers and call save_pretrained(folder, safe_serialization=True), then give that folder."
        )
    raise BaseModelError(
        f"{source}: {location} has no {WEIGHT_STEMS[component]}*.safetensors, the weights of the {component}."
    )


def choose_tokenizer(names: Collection[str], tokenizer: str, source: str) -> tuple[str, ...]:
    """Return the files of `tokenizer` or `tokenizer_2`. Raises BaseModelError when its vocabulary is missing."""
    files = sorted(
        name for name in names if name.startswith(f"{tokenizer}/") and name.endswith(_TOKENIZER_SUFFIXES)
    )
    kinds = {name.removeprefix(f"{tokenizer}/") for name in files}
    if "tokenizer.json" not in kinds and not {"vocab.json", "merges.txt"} <= kinds:
        raise BaseModelError(
            f"{source}: {tokenizer}/ lacks vocab.json and merges.txt (or tokenizer.json), the vocabulary of CLIP. "
            "Copy the folders tokenizer and tokenizer_2 of stabilityai/stable-diffusion-xl-base-1.0 there."
        )
    return tuple(files)


def _weights_pattern(stem: str, variant: str | None) -> re.Pattern[str]:
    """Return a pattern for the names of a single file, of shards and of their index, in old and new diffusers and transformers."""
    stem = re.escape(stem)
    shard = r"-\d{5}-of-\d{5}"
    if variant is None:
        return re.compile(rf"^{stem}({shard})?\.safetensors$|^{stem}\.safetensors\.index\.json$")
    single = rf"{stem}\.{variant}({shard})?\.safetensors"
    old_shard = rf"{stem}{shard}\.{variant}\.safetensors"
    return re.compile(rf"^({single}|{old_shard}|{stem}\.safetensors\.index\.{variant}\.json)$")
