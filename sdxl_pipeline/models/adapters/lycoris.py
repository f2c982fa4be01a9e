"""LyCORIS adapters (Yeh et al. 2023, arXiv:2309.14859) by the lycoris-lora package.

The network is the model's child module `lycoris`, so that moving, preparing or saving the model's parameters includes it. Its files use
the names that lycoris-lora's `create_lycoris_from_weights`, ComfyUI and SimpleTuner read.
"""

import fnmatch
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sdxl_pipeline.config.schema.lycoris import LycorisPreset, LycorisSettings
from sdxl_pipeline.models.adapters.adapter_files import AdapterError
from sdxl_pipeline.models.sgm_names import sgm_name, sgm_prefixes

NETWORK: Final = "lycoris"
"""Child module of a model with its adapter, and prefix of the names in a file."""

_NORM_SUFFIX: Final = ".dora_scale"

KOHYA_PREFIX: Final = "lora_unet_"
"""Prefix of the names in files of kohya's trainer."""


def add_lycoris(
    model: nn.Module,
    settings: LycorisSettings,
    seed: int,
    *,
    quantized: bool = False,
    init_norm: float | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and add trainable LyCORIS updates in float32 to the layers that the settings target.

    The model starts unchanged unless `init_norm` is given: then a LoKr of full matrices, ones (x) w2, starts with w2 normal with mean and
    standard deviation of the layer's weight, times `init_norm`. The returned parameters depend only on `seed`, and the global random state
    is unchanged. With `quantized` weights, updates are added to outputs. Raises AdapterError when a target matches no layer, when
    lycoris-lora is not installed, or when it could not load back a layer of these settings.
    """
    package = _package()
    preset = settings.apply_preset or LycorisPreset(target_module=("Linear", "Conv2d"))
    _require_targets(model, preset)
    model.requires_grad_(False)
    with _preset(package, preset), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = package.LycorisNetwork(
            model,
            lora_dim=settings.linear_dim,
            conv_lora_dim=settings.conv_dim or settings.linear_dim,
            alpha=settings.linear_alpha,
            conv_alpha=settings.conv_alpha or settings.linear_alpha,
            network_module=settings.algo,
            dropout=settings.dropout,
            rank_dropout=settings.rank_dropout,
            module_dropout=settings.module_dropout,
            use_tucker=settings.use_tucker,
            use_scalar=settings.use_scalar,
            factor=settings.factor,
            full_matrix=settings.full_matrix,
            decompose_both=settings.decompose_both,
            weight_decompose=settings.dora_wd,
            bypass_mode=quantized or settings.bypasses,
            warn_on_unmatched=False,
        )
        if not network.loras:
            raise AdapterError("lycoris_config: apply_preset targets no linear layer and no convolution.")
        if init_norm is not None:
            _init_as_noise(network, init_norm)
        _require_loadable(network)
    network.settings = settings
    _attach(model, network)
    return list(network.parameters())


def lycoris_network(model: nn.Module) -> Any | None:
    """Return the LyCORIS network of a model, None without one."""
    return model._modules.get(NETWORK)


def lycoris_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with an adapter, by name."""
    network: Any = lycoris_network(model)
    adapted = {id(lora.org_module[0]) for lora in network.loras}
    return {name: module for name, module in model.named_modules() if id(module) in adapted}


def lycoris_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter's tensors by their names in a file."""
    network: Any = lycoris_network(model)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def lycoris_header(model: nn.Module) -> dict[str, str]:
    """Return the training configuration as SimpleTuner writes it into a file's header; empty for a network loaded from a file."""
    settings: LycorisSettings | None = getattr(lycoris_network(model), "settings", None)
    if settings is None:
        return {}
    return {"lycoris_config": json.dumps(settings.model_dump(mode="json", exclude_none=True), sort_keys=True)}


def read_lycoris_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a UNet's file under lycoris-lora's names; kohya's names, which follow SGM or diffusers, are converted."""
    tensors = load_file(path)
    if not any(name.startswith(KOHYA_PREFIX) for name in tensors):
        return tensors
    prefixes = sgm_prefixes(model.config)  # type: ignore[arg-type]
    layers = {}
    for name, _ in model.named_modules():
        diffusers_name = name.replace(".", "_")
        for spelling in (diffusers_name, (sgm_name(name, prefixes) or diffusers_name).replace(".", "_")):
            layers[KOHYA_PREFIX + spelling] = f"{NETWORK}_{diffusers_name}"
    split = {name: name.partition(".") for name in tensors}
    return {
        f"{layers.get(split[name][0], split[name][0])}.{split[name][2]}": tensors[name] for name in tensors
    }


def load_lycoris(model: nn.Module, path: Path) -> None:
    """Add the adapter of a file to a model without one, with lycoris-lora's own loader.

    Updates are added to the layers' outputs where that is equivalent (all but weight decomposition), so that they are not rounded
    together with a bf16 weight. Raises AdapterError for missing or unexpected tensors.
    """
    network = _load_network(model, read_lycoris_tensors(path, model), path)
    for lora in network.loras:
        lora.bypass_mode = not lora.wd
    _attach(model, network)


def count_lycoris_layers(model: nn.Module, path: Path) -> int:
    """Return the number of layers that a file changes in a model, which may be on the meta device.

    Raises AdapterError for missing or unexpected tensors.
    """
    tensors = read_lycoris_tensors(path, model)
    # lycoris-lora computes norms from the weights, which a meta model lacks
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith(_NORM_SUFFIX)}
    network = _load_network(
        model, {name: tensor for name, tensor in tensors.items() if name not in norms}, path
    )
    rows = {
        f"{lora.lora_name}{_NORM_SUFFIX}": (lora.dim, *[1] * (len(lora.shape) - 1)) for lora in network.loras
    }
    if mismatched := sorted(name for name, tensor in norms.items() if tensor.shape != rows.get(name)):
        raise AdapterError(
            f"{path} does not fit this model: {len(mismatched)} unexpected or differently shaped norms, such as {mismatched[0]}."
        )
    return len(network.loras)


def _load_network(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> Any:
    package = _package()
    with _preset(package, LycorisPreset()), torch.random.fork_rng(devices=[]):
        try:
            network, _ = package.create_lycoris_from_weights(1.0, "", model, weights_sd=dict(tensors))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise AdapterError(f"lycoris-lora cannot load {path}: {error}") from error
    loaded = {
        f"{lora.lora_name}.{name}": tensor.shape
        for lora in network.loras
        for name, tensor in lora.state_dict().items()
    }
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    if mismatched := sorted(
        name for name in loaded.keys() | stored.keys() if loaded.get(name) != stored.get(name)
    ):
        raise AdapterError(
            f"{path} does not fit this model: {len(mismatched)} missing, unexpected or differently shaped tensors, such as "
            f"{mismatched[0]}."
        )
    return network


@contextmanager
def without_lycoris(model: nn.Module) -> Iterator[None]:
    """Disable the model's adapter while the block runs; a multiplier of zero would not, where norms are trained."""
    network: Any = lycoris_network(model)
    network.restore()
    try:
        yield
    finally:
        network.apply_to()


def _attach(model: nn.Module, network: Any) -> None:
    network.apply_to()
    network.requires_grad_(True)
    model.add_module(NETWORK, network.to(next(model.parameters()).device))


def _package() -> Any:
    try:
        import lycoris
    except ImportError as error:
        raise AdapterError(
            "lora_type lycoris needs lycoris-lora: pip install 'sdxl-pipeline[lycoris]', or set lora_type to standard."
        ) from error
    return lycoris


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _preset(package: Any, preset: LycorisPreset) -> Iterator[None]:
    """Set the preset while the block runs; lycoris-lora keeps targets in the class, where they would affect the next network."""
    network = package.LycorisNetwork
    values = {
        "ENABLE_CONV": preset.enable_conv,
        "TARGET_REPLACE_MODULE": list(preset.target_module),
        "TARGET_REPLACE_NAME": list(preset.target_name),
        "TARGET_EXCLUDE_NAME": list(preset.exclude_name),
        "MODULE_ALGO_MAP": _algo_map(preset.module_algo_map),
        "NAME_ALGO_MAP": _algo_map(preset.name_algo_map),
        "USE_FNMATCH": preset.use_fnmatch,
        "LORA_PREFIX": NETWORK,
    }
    before = {name: getattr(network, name) for name in values}
    try:
        for name, value in values.items():
            setattr(network, name, value)
        with _quiet():
            yield
    finally:
        for name, value in before.items():
            setattr(network, name, value)


def _algo_map(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: override.model_dump(exclude_none=True) for name, override in overrides.items()}


def _require_targets(model: nn.Module, preset: LycorisPreset) -> None:
    classes = {type(module).__name__ for module in model.modules()}
    absent = sorted({*preset.target_module, *preset.module_algo_map} - classes)
    if absent:
        blocks = ", ".join(
            sorted(classes & {"Attention", "FeedForward", "ResnetBlock2D", "Transformer2DModel"})
        )
        raise AdapterError(
            f"lycoris_config: the model has no module of the class {', '.join(absent)}. Some that it has: {blocks}."
        )
    names = [name for name, _ in model.named_modules() if name]
    match = fnmatch.fnmatch if preset.use_fnmatch else lambda name, pattern: bool(re.match(pattern, name))
    for pattern in (*preset.target_name, *preset.name_algo_map, *preset.exclude_name):
        if not any(name == pattern or match(name, pattern) for name in names):
            raise AdapterError(f"lycoris_config: {pattern!r} matches no layer name of the model.")


def _init_as_noise(network: Any, scale: float) -> None:
    for lora in network.loras:
        if not (lora.use_w1 and lora.use_w2):
            raise AdapterError(
                "init_lokr_norm needs a LoKr of full matrices: set full_matrix to true, or linear_dim to 10000, in lycoris_config."
            )
        weight = lora.org_weight.float()
        noise = torch.randn(lora.lokr_w2.shape)
        with torch.no_grad():
            lora.lokr_w1.fill_(1.0)
            lora.lokr_w2.copy_(scale * (weight.mean() + weight.std() * (noise - noise.mean()) / noise.std()))


def _require_loadable(network: Any) -> None:
    """Raise AdapterError if a layer, loaded back from a file, would have other shapes: lycoris-lora infers its factorization from them."""
    from lycoris.modules import get_module, make_module

    seen: set[tuple[Any, ...]] = set()
    for lora in network.loras:
        tensors = {f"{lora.lora_name}.{name}": tensor.detach() for name, tensor in lora.state_dict().items()}
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        layout = (type(lora), lora.shape, *shapes.values())
        if layout in seen:
            continue
        seen.add(layout)
        kind, parts = get_module(tensors, lora.lora_name)
        try:
            reloaded = make_module(kind, parts, lora.lora_name, lora.org_module[0])
            reloaded_shapes = {
                f"{lora.lora_name}.{name}": tensor.shape for name, tensor in reloaded.state_dict().items()
            }
        except RuntimeError:
            reloaded_shapes = {}
        if reloaded_shapes != shapes:
            raise AdapterError(
                f"lycoris_config: lycoris-lora could not load back {lora.lora_name.removeprefix(NETWORK + '_')} with this factor and rank. "
                "Set another factor (a divisor of the layers' sizes), or full_matrix to true."
            )
