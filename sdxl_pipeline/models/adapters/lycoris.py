"""LyCORIS adapters (Yeh et al. 2023, arXiv:2309.14859) through the lycoris-lora package.

The network hangs in the model as its child `lycoris`, so that whatever moves, prepares or saves the model's parameters sees it. Its
files have the names that lycoris-lora's `create_lycoris_from_weights`, ComfyUI and SimpleTuner read.
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
"""The child of a model that holds its adapter, and what the names in a file begin with."""

_NORMS: Final = ".dora_scale"

KOHYA_PREFIX: Final = "lora_unet_"
"""What they begin with in files of kohya's trainer."""


def add_lycoris(
    model: nn.Module,
    settings: LycorisSettings,
    seed: int,
    *,
    quantized: bool = False,
    init_norm: float | None = None,
) -> list[nn.Parameter]:
    """Freeze a model and give the layers that the settings target a trainable LyCORIS update, in float32.

    The model starts unchanged unless `init_norm` is given: then a LoKr of whole matrices, ones (x) w2, starts with w2 normal with mean and
    standard deviation of the layer's weight, times `init_norm`. The parameters, which are returned, depend on `seed` alone, and the
    global random state is left as it was. Over `quantized` weights, updates are added to outputs. Raises AdapterError when a target
    names no layer, when lycoris-lora is absent, or when it would not load back a layer of these settings.
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
            _start_as_noise(network, init_norm)
        _require_loadable(network)
    network.settings = settings
    _attach(model, network)
    return list(network.parameters())


def lycoris_network(model: nn.Module) -> Any | None:
    """The LyCORIS network of a model that has one."""
    return model._modules.get(NETWORK)


def lycoris_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by name."""
    network: Any = lycoris_network(model)
    adapted = {id(lora.org_module[0]) for lora in network.loras}
    return {name: module for name, module in model.named_modules() if id(module) in adapted}


def lycoris_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their names in a file."""
    network: Any = lycoris_network(model)
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def lycoris_header(model: nn.Module) -> dict[str, str]:
    """What SimpleTuner writes into a file's header as well: the configuration that it was trained with, of a network made here."""
    settings: LycorisSettings | None = getattr(lycoris_network(model), "settings", None)
    if settings is None:
        return {}
    return {"lycoris_config": json.dumps(settings.model_dump(mode="json", exclude_none=True), sort_keys=True)}


def read_lycoris_tensors(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a file for a UNet under lycoris-lora's names; kohya's, which spell layers as SGM or diffusers do, are renamed."""
    tensors = load_file(path)
    if not any(name.startswith(KOHYA_PREFIX) for name in tensors):
        return tensors
    prefixes = sgm_prefixes(model.config)  # type: ignore[arg-type]
    layers = {}
    for name, _ in model.named_modules():
        ours = name.replace(".", "_")
        for spelling in (ours, (sgm_name(name, prefixes) or ours).replace(".", "_")):
            layers[KOHYA_PREFIX + spelling] = f"{NETWORK}_{ours}"
    split = {name: name.partition(".") for name in tensors}
    return {
        f"{layers.get(split[name][0], split[name][0])}.{split[name][2]}": tensors[name] for name in tensors
    }


def load_lycoris(model: nn.Module, path: Path) -> None:
    """Add the adapter of a file to a model that has none, through lycoris-lora's own loader.

    Updates are added to the layers' outputs where that is the same function (all but weight decomposition), so that they are not
    rounded together with a bf16 weight. Raises AdapterError for a file of which a tensor finds no place.
    """
    network = _network_of(model, read_lycoris_tensors(path, model), path)
    for lora in network.loras:
        lora.bypass_mode = not lora.wd
    _attach(model, network)


def count_lycoris_layers(model: nn.Module, path: Path) -> int:
    """How many layers of a model, which may be without weights (on the meta device), a file changes.

    Raises AdapterError for a file of which a tensor finds no place.
    """
    tensors = read_lycoris_tensors(path, model)
    # lycoris-lora makes norms from the weights, which are not there
    norms = {name: tensor for name, tensor in tensors.items() if name.endswith(_NORMS)}
    network = _network_of(
        model, {name: tensor for name, tensor in tensors.items() if name not in norms}, path
    )
    rows = {f"{lora.lora_name}{_NORMS}": (lora.dim, *[1] * (len(lora.shape) - 1)) for lora in network.loras}
    if astray := sorted(name for name, tensor in norms.items() if tensor.shape != rows.get(name)):
        raise AdapterError(f"{path} does not fit this model: {len(astray)} norms are astray, as {astray[0]}.")
    return len(network.loras)


def _network_of(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> Any:
    package = _package()
    with _preset(package, LycorisPreset()), torch.random.fork_rng(devices=[]):
        try:
            network, _ = package.create_lycoris_from_weights(1.0, "", model, weights_sd=dict(tensors))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise AdapterError(f"{path} is not loaded by lycoris-lora: {error}") from error
    loaded = {
        f"{lora.lora_name}.{name}": tensor.shape
        for lora in network.loras
        for name, tensor in lora.state_dict().items()
    }
    stored = {name: tensor.shape for name, tensor in tensors.items()}
    if astray := sorted(
        name for name in loaded.keys() | stored.keys() if loaded.get(name) != stored.get(name)
    ):
        raise AdapterError(
            f"{path} does not fit this model: {len(astray)} tensors are astray, as {astray[0]}."
        )
    return network


@contextmanager
def without_lycoris(model: nn.Module) -> Iterator[None]:
    """The model without its adapter; a strength of zero would not be that where norms are trained."""
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
            "lora_type lycoris needs lycoris-lora: pip install 'sdxl-pipeline[lycoris]', or write lora_type: standard."
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
    """The package keeps its targets in the class, where they would hold for the next network as well."""
    network = package.LycorisNetwork
    values = {
        "ENABLE_CONV": preset.enable_conv,
        "TARGET_REPLACE_MODULE": list(preset.target_module),
        "TARGET_REPLACE_NAME": list(preset.target_name),
        "TARGET_EXCLUDE_NAME": list(preset.exclude_name),
        "MODULE_ALGO_MAP": _maps(preset.module_algo_map),
        "NAME_ALGO_MAP": _maps(preset.name_algo_map),
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


def _maps(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: override.model_dump(exclude_none=True) for name, override in overrides.items()}


def _require_targets(model: nn.Module, preset: LycorisPreset) -> None:
    classes = {type(module).__name__ for module in model.modules()}
    absent = sorted({*preset.target_module, *preset.module_algo_map} - classes)
    if absent:
        blocks = ", ".join(
            sorted(classes & {"Attention", "FeedForward", "ResnetBlock2D", "Transformer2DModel"})
        )
        raise AdapterError(
            f"lycoris_config: no module of the model is of the class {', '.join(absent)}. Some that are: {blocks}."
        )
    names = [name for name, _ in model.named_modules() if name]
    match = fnmatch.fnmatch if preset.use_fnmatch else lambda name, pattern: bool(re.match(pattern, name))
    for pattern in (*preset.target_name, *preset.name_algo_map, *preset.exclude_name):
        if not any(name == pattern or match(name, pattern) for name in names):
            raise AdapterError(f"lycoris_config: no layer of the model has a name that {pattern!r} matches.")


def _start_as_noise(network: Any, scale: float) -> None:
    for lora in network.loras:
        if not (lora.use_w1 and lora.use_w2):
            raise AdapterError(
                "init_lokr_norm needs a LoKr of whole matrices: write full_matrix true, or linear_dim 10000, in lycoris_config."
            )
        weight = lora.org_weight.float()
        noise = torch.randn(lora.lokr_w2.shape)
        with torch.no_grad():
            lora.lokr_w1.fill_(1.0)
            lora.lokr_w2.copy_(scale * (weight.mean() + weight.std() * (noise - noise.mean()) / noise.std()))


def _require_loadable(network: Any) -> None:
    """Raise AdapterError when a layer, written to a file, would come back from it with other shapes: its split is guessed from them."""
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
            again = make_module(kind, parts, lora.lora_name, lora.org_module[0])
            found = {f"{lora.lora_name}.{name}": tensor.shape for name, tensor in again.state_dict().items()}
        except RuntimeError:
            found = {}
        if found != shapes:
            raise AdapterError(
                f"lycoris_config: lycoris-lora would not load back {lora.lora_name.removeprefix(NETWORK + '_')} of this factor and rank. "
                "Write another factor (a divisor of the layers' sizes), or full_matrix true."
            )
