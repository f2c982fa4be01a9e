"""Registry of optimizers: library, class and default options by name.

The names and options are SimpleTuner's unless a comment states otherwise. None of the libraries is imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_pipeline.config.schema.optimization import OptimizerName, OptimizerValue
from sdxl_pipeline.config.schema.settings_model import BadValueError

_DISTRIBUTIONS = {"optimi": "torch-optimi"}
"""Distribution names that differ from the module name."""

INSTALL = "install the extra with `pip install 'sdxl-pipeline[optimizers]'`"


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer: package, class and default options.

    `options` are the keyword arguments of the class with its defaults, which define their types; a test compares them with the library.
    `defaults` replace them here. `reserved` are arguments that other settings or the trainer set. `state_group_keys` are entries of its parameter
    groups that steps change, so they are part of the optimizer state.
    """

    package: str
    module: str
    class_name: str
    options: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    state_group_keys: frozenset[str] = frozenset()

    @property
    def distribution(self) -> str:
        """Return the name of the package on PyPI."""
        return _DISTRIBUTIONS.get(self.package, self.package)


_ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-6}

_MOMENTS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_TORCH_OPTIONS = {"weight_decay": 0.0, "foreach": None, "maximize": False}
_TORCHAO_OPTIONS = {**_MOMENTS, "amsgrad": False}
_OPTIMI_OPTIONS = {
    "weight_decay": 0.0,
    "decouple_lr": False,
    "max_lr": None,
    "kahan_sum": None,
    "foreach": None,
    "triton": None,
}
_BETAS = {"betas": (0.9, 0.999)}
_EPS = {"eps": 1e-8}


def _optimi(class_name: str, options: Mapping[str, Any], **defaults: Any) -> OptimizerSpec:
    # gradient_release steps during the backward pass, outside the training loop
    return OptimizerSpec(
        "optimi",
        "optimi",
        class_name,
        {**_OPTIMI_OPTIONS, **options},
        defaults,
        frozenset({"gradient_release"}),
        frozenset({"step"}),
    )


def _torchao(class_name: str) -> OptimizerSpec:
    options = {**_TORCHAO_OPTIONS, "block_size": 256}
    return OptimizerSpec(
        "torchao", "torchao.optim", class_name, options, _ADAMW, frozenset({"bf16_stochastic_round"})
    )


def _bitsandbytes() -> Mapping[str, OptimizerSpec]:
    """Return bnb-adamw, bnb-adamw8bit, bnb-adamw-paged, bnb-adamw8bit-paged and so on for each kind that has them."""
    all_variants = ("", "8bit", "-paged", "8bit-paged")
    lion = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    mix = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "weight_decay": 0.01, "eps": 1e-8}
    grad = {"weight_decay": 0.0, "eps": 1e-10}
    # name: class, further arguments of the class, defaults, variants
    kinds: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any], tuple[str, ...]]] = {
        "adam": ("Adam", {"amsgrad": False}, _MOMENTS, ("", "8bit")),
        "adamw": ("AdamW", {"amsgrad": False}, _ADAMW, all_variants),
        "lion": ("Lion", {}, lion, all_variants),
        "ademamix": ("AdEMAMix", {"t_alpha": None, "t_beta3": None}, mix, all_variants),
        "adagrad": ("Adagrad", {"lr_decay": 0.0, "initial_accumulator_value": 0.0}, grad, ("", "8bit")),
    }
    return {
        f"bnb-{kind}{variant}": OptimizerSpec(
            "bitsandbytes",
            "bitsandbytes.optim",
            ("Paged" if "paged" in variant else "") + class_name + ("8bit" if "8bit" in variant else ""),
            {**defaults, **options, "min_8bit_size": 4096},
            defaults,
            frozenset({"args", "optim_bits", "is_paged"}),
        )
        for kind, (class_name, options, defaults, variants) in kinds.items()
        for variant in variants
    }


def _schedule_free(weight_decay: float, eps: float) -> OptimizerSpec:
    # Defazio et al. 2024, the authors' implementation; SimpleTuner's class adds Kahan summation for bf16 weights, which do not occur here
    defaults = {"betas": (0.9, 0.999), "weight_decay": weight_decay, "eps": eps}
    return OptimizerSpec(
        "schedulefree",
        "schedulefree",
        "AdamWScheduleFree",
        {**_MOMENTS, "r": 0.0, "weight_lr_power": 2.0, "foreach": True},
        defaults,
        frozenset({"warmup_steps"}),
        frozenset({"k", "weight_sum", "lr_max", "scheduled_lr"}),
    )


def _torch(class_name: str, options: Mapping[str, Any], **defaults: Any) -> OptimizerSpec:
    # a capturable or differentiable step is for programs of another kind
    reserved = frozenset({"capturable", "differentiable"})
    return OptimizerSpec(
        "torch", "torch.optim", class_name, {**_TORCH_OPTIONS, **options}, defaults, reserved
    )


OPTIMIZERS: Mapping[OptimizerName, OptimizerSpec] = {
    "adamw": _torch("AdamW", {**_BETAS, **_EPS, "amsgrad": False, "fused": None}, **{**_ADAMW, "eps": 1e-8}),
    "torch-adam": _torch(
        "Adam",
        {**_BETAS, **_EPS, "amsgrad": False, "fused": None, "decoupled_weight_decay": False},
        betas=(0.9, 0.999),
        weight_decay=0.0,
        eps=1e-8,
    ),
    "torch-adamw": _torch(
        "AdamW",
        {**_BETAS, **_EPS, "amsgrad": False, "fused": None},
        betas=(0.9, 0.999),
        weight_decay=0.01,
        eps=1e-8,
    ),
    "torch-sgd": _torch(
        "SGD",
        {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "fused": None},
        momentum=0.0,
        weight_decay=0.0,
    ),
    "torch-radam": _torch(
        "RAdam",
        {**_BETAS, **_EPS, "decoupled_weight_decay": False},
        betas=(0.9, 0.999),
        weight_decay=0.0,
        eps=1e-8,
    ),
    "torch-nadam": _torch(
        "NAdam",
        {**_BETAS, **_EPS, "momentum_decay": 4e-3, "decoupled_weight_decay": False},
        betas=(0.9, 0.999),
        weight_decay=0.0,
        eps=1e-8,
        momentum_decay=4e-3,
    ),
    "torch-rmsprop": _torch(
        "RMSprop",
        {**_EPS, "alpha": 0.99, "momentum": 0.0, "centered": False},
        alpha=0.99,
        momentum=0.0,
        weight_decay=0.0,
        eps=1e-8,
    ),
    "torch-adagrad": _torch(
        "Adagrad",
        {**_EPS, "lr_decay": 0.0, "initial_accumulator_value": 0.0, "fused": None},
        lr_decay=0.0,
        weight_decay=0.0,
        eps=1e-10,
    ),
    "torch-adadelta": _torch("Adadelta", {**_EPS, "rho": 0.9}, rho=0.9, weight_decay=0.0, eps=1e-6),
    "torch-adafactor": _torch(
        "Adafactor",
        {"beta2_decay": -0.8, "eps": (None, 1e-3), "d": 1.0},
        beta2_decay=-0.8,
        d=1.0,
        weight_decay=0.0,
    ),
    "torch-adamax": _torch("Adamax", {**_BETAS, **_EPS}, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8),
    "torch-asgd": _torch(
        "ASGD", {"lambd": 1e-4, "alpha": 0.75, "t0": 1e6}, lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0
    ),
    "adamw_bf16": OptimizerSpec(
        "torchao",
        "sdxl_pipeline.training.optim.torchao_optimizers",
        "StochasticAdamW",
        _TORCHAO_OPTIONS,
        _ADAMW,
    ),
    "adamw_schedulefree": _schedule_free(0.01, 1e-8),
    "adamw_schedulefree+aggressive": _schedule_free(0.001, 1e-6),
    "adamw_schedulefree+no_kahan": _schedule_free(0.001, 1e-6),
    # torch-optimi's Kahan summation is on where weights are bf16, and Lion's everywhere
    "optimi-adam": _optimi(
        "Adam", {**_BETAS, **_EPS, "decouple_wd": False}, betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6
    ),
    "optimi-adamw": _optimi("AdamW", {**_BETAS, **_EPS}, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-6),
    "optimi-adan": _optimi(
        "Adan",
        {**_EPS, "betas": (0.98, 0.92, 0.99), "adam_wd": False, "kahan_sum": False},
        betas=(0.98, 0.92, 0.999),
        weight_decay=0.02,
        eps=1e-6,
    ),
    "optimi-lion": _optimi("Lion", _BETAS, betas=(0.9, 0.99), weight_decay=0.0, kahan_sum=True),
    "optimi-radam": _optimi(
        "RAdam",
        {**_BETAS, **_EPS, "decouple_wd": False},
        betas=(0.9, 0.99),
        weight_decay=0.0,
        eps=1e-6,
        decouple_wd=True,
    ),
    "optimi-ranger": _optimi(
        "Ranger",
        {**_BETAS, **_EPS, "k": 6, "alpha": 0.5, "decouple_wd": True},
        betas=(0.9, 0.99),
        weight_decay=0.0,
        eps=1e-6,
        k=6,
        alpha=0.5,
        decouple_wd=True,
    ),
    "optimi-sgd": _optimi(
        "SGD",
        {"momentum": 0.0, "dampening": False, "decouple_wd": False, "torch_init": False},
        momentum=0.0,
        weight_decay=0.0,
    ),
    "optimi-stableadamw": _optimi(
        "StableAdamW", {**_BETAS, **_EPS}, betas=(0.9, 0.99), weight_decay=0.01, eps=1e-6
    ),
    "ao-adamw8bit": _torchao("AdamW8bit"),
    "ao-adamw4bit": _torchao("AdamW4bit"),
    "ao-adamfp8": _torchao("AdamFp8"),
    "ao-adamwfp8": _torchao("AdamWFp8"),
    **_bitsandbytes(),  # type: ignore[dict-item]
    # by the method's authors (Mishchenko and Defazio 2023); SimpleTuner takes another author's extension, with options of its own
    "prodigy": OptimizerSpec(
        "prodigyopt",
        "prodigyopt",
        "Prodigy",
        {
            **_MOMENTS,
            "beta3": None,
            "decouple": True,
            "use_bias_correction": False,
            "safeguard_warmup": False,
            "d0": 1e-6,
            "d_coef": 1.0,
            "growth_rate": float("inf"),
            "slice_p": 1,
        },
        {"betas": (0.9, 0.99), "weight_decay": 0.0, "d0": 1e-6, "d_coef": 1.0},
        frozenset({"fsdp_in_use"}),
        frozenset({"d", "d_max", "d_numerator", "d_denom", "d_hat", "k"}),
    ),
    # Relative step size and parameter scaling are off: a LoRA's weights start at zero, and learning_rate is the actual step size
    # (Shazeer and Stern 2018, sections 8 and 9).
    "adafactor": OptimizerSpec(
        "transformers",
        "transformers.optimization",
        "Adafactor",
        {
            "eps": (1e-30, 1e-3),
            "clip_threshold": 1.0,
            "decay_rate": -0.8,
            "beta1": None,
            "weight_decay": 0.0,
            "scale_parameter": True,
        },
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
        frozenset({"relative_step", "warmup_init"}),
    ),
}


def read_options(optimizer: OptimizerName, written: Mapping[str, OptimizerValue]) -> dict[str, Any]:
    """Return `optimizer_config` as keyword arguments of the optimizer's class; `beta1`, `beta2`, `beta3` are combined to `betas` if needed.

    Raise BadValueError for an unknown option, and for a value of another type than the option's default.
    """
    spec = OPTIMIZERS[optimizer]
    betas = list(spec.defaults.get("betas", ()))
    single = [f"beta{number}" for number in range(1, len(betas) + 1) if f"beta{number}" not in spec.options]
    options: dict[str, Any] = {}
    for name, value in written.items():
        if name in single:
            betas[single.index(name)] = _number(name, value)
        elif name in spec.options:
            options[name] = _typed(name, value, spec.options[name])
    if unknown := sorted(set(written) - set(single) - set(spec.options)):
        known = ", ".join([*single, *sorted(set(spec.options) - {"betas"})])
        elsewhere = "write it in learning_rate; " if unknown == ["lr"] else ""
        raise BadValueError(
            f"has {', '.join(map(repr, unknown))}, which {optimizer!r} does not accept",
            f"{elsewhere}{optimizer} accepts {known}",
        )
    if betas and "betas" not in options:
        options["betas"] = tuple(betas)
    if options.get("fused") is True and options.get("foreach") is True:
        raise BadValueError("has fused and foreach, which cannot both be true", "keep one of the two")
    for name in ("weight_decay", "eps"):
        if isinstance(options.get(name), int | float) and options[name] < 0:
            raise BadValueError(f"has {name} = {options[name]:g}", f"write a {name} of at least 0")
    if any(not isinstance(beta, int | float) or not 0 <= beta < 1 for beta in options.get("betas", ())):
        raise BadValueError(f"has betas = {options['betas']}", "write betas of at least 0 and below 1")
    if len(options.get("betas", betas)) != len(betas):
        raise BadValueError(f"has {len(options['betas'])} betas", f"write {len(betas)}")
    return options


def _typed(name: str, value: Any, default: Any) -> Any:
    """Convert a value of `optimizer_config`, where every number is a float, to the type of the option's default."""
    if isinstance(value, str) and value.lower() == "none":
        return None
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise BadValueError(f"has {name} = {value!r}", f"write {name}=true or {name}=false")
    if isinstance(default, int | float):
        number = _number(name, value)
        return int(number) if isinstance(default, int) and float(number).is_integer() else number
    if isinstance(default, tuple):
        if isinstance(value, tuple) and len(value) == len(default):
            return value
        raise BadValueError(
            f"has {name} = {value!r}", f"write a list of {len(default)} numbers, in an object"
        )
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(name: str, value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    raise BadValueError(f"has {name} = {value!r}", f"write a number, such as {name}=0.01")
