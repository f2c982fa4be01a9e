"""Adapters of all kinds: add, load, save and disable, by the kind that a model or a file contains.

A file may contain adapters of several models, each under a prefix: `unet`, `text_encoder`, `text_encoder_2`.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import safe_open
from torch import nn

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.files.stable_safetensors import write_stable_safetensors
from sdxl_pipeline.models.adapters.adapter_files import PREFIXES, UNET, AdapterError, AdapterKind, read_header
from sdxl_pipeline.models.adapters.lora import (
    ADAPTER_NAME,
    add_lora,
    load_lora,
    lora_header,
    lora_layers,
    lora_tensors,
)
from sdxl_pipeline.models.adapters.lycoris import (
    add_lycoris,
    load_lycoris,
    lycoris_header,
    lycoris_layers,
    lycoris_network,
    lycoris_tensors,
    without_lycoris,
)

__all__ = [
    "ADAPTER_NAME",
    "PREFIXES",
    "UNET",
    "AdapterError",
    "AdapterKind",
    "adapted_module_names",
    "adapter_kind",
    "adapter_parameters",
    "add_adapter",
    "add_lora",
    "add_lycoris",
    "load_adapter",
    "require_complete",
    "save_adapter",
    "scaled_adapter",
    "without_adapter",
]


def add_adapter(unet: nn.Module, settings: TrainingSettings, seed: int) -> list[nn.Parameter]:
    """Freeze a UNet, add the adapter of the settings and return its trainable parameters, in float32.

    Raises AdapterError when the adapter cannot be added to this UNet.
    """
    if settings.lora_type == "lycoris":
        return add_lycoris(
            unet,
            settings.lycoris,
            seed,
            quantized=settings.base_model_precision not in (None, "no_change"),
            init_norm=settings.init_lokr_norm,
        )
    return add_lora(
        unet,
        rank=settings.lora_rank,
        alpha=settings.effective_lora_alpha,
        dropout=settings.lora_dropout,
        target_modules=settings.lora_target_modules,
        seed=seed,
        use_dora=settings.use_dora,
        init=settings.lora_init_type,
    )


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the trainable parameters in the order of the model's modules."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted_module_names(model: nn.Module) -> list[str]:
    """Return the names of the layers with an adapter, sorted."""
    return sorted(lora_layers(model) if lycoris_network(model) is None else lycoris_layers(model))


def adapter_kind(model: nn.Module) -> AdapterKind:
    """Return the kind of a model's adapter."""
    if lycoris_network(model) is not None:
        return "lycoris"
    return "dora" if any(config.use_dora for config in model.peft_config.values()) else "lora"  # type: ignore[operator]


@contextmanager
def without_adapter(*models: nn.Module) -> Iterator[None]:
    """Disable the models' adapters while the block runs."""
    with ExitStack() as stack:
        for model in models:
            if lycoris_network(model) is not None:
                stack.enter_context(without_lycoris(model))
            else:
                model.disable_adapters()  # type: ignore[operator]
                stack.callback(model.enable_adapters)  # type: ignore[arg-type]
        yield


@contextmanager
def scaled_adapter(
    models: Iterable[nn.Module], scale: float, adapter_name: str = ADAPTER_NAME
) -> Iterator[None]:
    """Multiply the updates of the models' adapters by `scale` while the block runs. 0 disables them, including trained norms.

    Norms at other scales follow diffusers for DoRA, where they normalize W + scale * B A, and lycoris-lora for LyCORIS, where the factor
    that they apply is moved towards 1.
    """
    models = list(models)
    if scale == 0:
        with without_adapter(*models):
            yield
        return
    _set_scale(models, scale, adapter_name)
    try:
        yield
    finally:
        _set_scale(models, 1.0, adapter_name)


def _set_scale(models: Iterable[nn.Module], scale: float, adapter_name: str) -> None:
    for model in models:
        if (network := lycoris_network(model)) is not None:
            network.set_multiplier(scale)
        else:
            for layer in lora_layers(model).values():
                layer.set_scale(adapter_name, scale)


def save_adapter(
    models: Mapping[str, nn.Module],
    path: Path,
    metadata: Mapping[str, str] | None = None,
    adapter_name: str = ADAPTER_NAME,
) -> None:
    """Write the adapters of `models`, by prefix, to `path` in the standard format of their kind.

    LoRA and DoRA: diffusers', for `StableDiffusionXLPipeline.load_lora_weights`. LyCORIS, of the UNet only: lycoris-lora's, for its
    `create_lycoris_from_weights` and ComfyUI. The file is written atomically, and its bytes depend only on the weights and `metadata`.
    Raises AdapterError for LyCORIS with a text encoder.
    """
    header = dict(metadata or {})
    if lycoris_network(models[UNET]) is not None:
        if len(models) > 1:
            raise AdapterError("A LyCORIS file contains only the UNet's adapter; remove the text encoders.")
        write_stable_safetensors(path, lycoris_tensors(models[UNET]), header | lycoris_header(models[UNET]))
        return
    tensors = {
        name: tensor
        for prefix, model in models.items()
        for name, tensor in lora_tensors(model, prefix, adapter_name).items()
    }
    write_stable_safetensors(path, tensors, header | lora_header(models, adapter_name))


def load_adapter(
    models: Mapping[str, nn.Module], path: Path, adapter_name: str = ADAPTER_NAME
) -> dict[str, list[str]]:
    """Add the adapters of a file to `models`, by prefix, and return the names of the changed layers of each.

    Files are loaded like in other programs: by diffusers' loader, or by lycoris-lora's. Weights for a model that is not given are
    ignored. Raises AdapterError for a file that changes no layer of one of the models.
    """
    if read_header(path).kind == "lycoris":
        if others := models.keys() - {UNET}:
            raise AdapterError(
                f"{path} is a LyCORIS file, which contains nothing for {', '.join(sorted(others))}."
            )
        load_lycoris(models[UNET], path)
    else:
        load_lora(models, path, adapter_name)
    return {prefix: adapted_module_names(model) for prefix, model in models.items()}


def require_complete(models: Mapping[str, nn.Module], path: Path, adapter_name: str = ADAPTER_NAME) -> None:
    """Raise AdapterError unless `models` have exactly the tensors of the file in diffusers' format.

    Diffusers only warns about missing and unexpected tensors.
    """
    if lycoris_network(models[UNET]) is not None:
        return  # load_lycoris compares itself
    loaded = {
        name: tensor.shape
        for prefix, model in models.items()
        for name, tensor in lora_tensors(model, prefix, adapter_name).items()
    }
    with safe_open(path, framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if mismatched := sorted(
        name for name in loaded.keys() | stored.keys() if loaded.get(name) != stored.get(name)
    ):
        raise AdapterError(
            f"{path} does not fit: {len(mismatched)} missing, unexpected or differently shaped tensors, such as {mismatched[0]}."
        )
