"""Which class of which library each optimizer's name stands for, and the options it starts from.

The names and options are SimpleTuner's, except where a comment says otherwise. None of the libraries is imported here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_pipeline.project.sections.optimisation import OptimizerName

_DISTRIBUTIONS = {"optimi": "torch-optimi"}
"""Packages whose name at the index is not that of their module."""

INSTALL = "install the extra with `pip install 'sdxl-pipeline[optimizers]'`"


@dataclass(frozen=True)
class Recipe:
    """One optimizer: the package it comes from, the class, and the options it starts from.

    `reserved` are options of the class that other settings, or the trainer, decide. `learnt` are entries of its parameter groups that
    are no options: steps change them, and they are part of what it has learnt.
    """

    package: str
    module: str
    class_name: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    reserved: frozenset[str] = frozenset()
    learnt: frozenset[str] = frozenset()

    @property
    def distribution(self) -> str:
        """The name of the package at the index."""
        return _DISTRIBUTIONS.get(self.package, self.package)


_ADAMW = {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-6}


def _optimi(class_name: str, **defaults: Any) -> Recipe:
    # gradient_release would take the step out of the loop's hands
    return Recipe(
        "optimi", "optimi", class_name, defaults, frozenset({"gradient_release"}), frozenset({"step"})
    )


def _torchao(class_name: str) -> Recipe:
    return Recipe("torchao", "torchao.optim", class_name, _ADAMW, frozenset({"bf16_stochastic_round"}))


def _bitsandbytes() -> Mapping[str, Recipe]:
    """bnb-adamw, bnb-adamw8bit, bnb-adamw-paged, bnb-adamw8bit-paged and so on for each kind that has them."""
    moments = {"betas": (0.9, 0.999), "weight_decay": 0.0, "eps": 1e-8}
    kinds: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
        "adam": ("Adam", moments, ("", "8bit")),
        "adamw": ("AdamW", _ADAMW, ("", "8bit", "-paged", "8bit-paged")),
        "lion": ("Lion", {"betas": (0.9, 0.99), "weight_decay": 0.0}, ("", "8bit", "-paged", "8bit-paged")),
        "ademamix": (
            "AdEMAMix",
            {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "weight_decay": 0.01, "eps": 1e-8},
            ("", "8bit", "-paged", "8bit-paged"),
        ),
        "adagrad": ("Adagrad", {"weight_decay": 0.0, "eps": 1e-10}, ("", "8bit")),
    }
    return {
        f"bnb-{kind}{variant}": Recipe(
            "bitsandbytes",
            "bitsandbytes.optim",
            ("Paged" if "paged" in variant else "") + class_name + ("8bit" if "8bit" in variant else ""),
            defaults,
            frozenset({"args", "optim_bits", "is_paged"}),
        )
        for kind, (class_name, defaults, variants) in kinds.items()
        for variant in variants
    }


def _schedule_free(weight_decay: float, eps: float) -> Recipe:
    # Defazio et al. 2024, by the authors; SimpleTuner's own class adds Kahan summation for bf16 weights, which these are not
    defaults = {"betas": (0.9, 0.999), "weight_decay": weight_decay, "eps": eps}
    return Recipe(
        "schedulefree",
        "schedulefree",
        "AdamWScheduleFree",
        defaults,
        frozenset({"warmup_steps"}),
        frozenset({"k", "weight_sum", "lr_max", "scheduled_lr"}),
    )


def _torch(class_name: str, **defaults: Any) -> Recipe:
    # a capturable or differentiable step is for programs of another kind
    return Recipe("torch", "torch.optim", class_name, defaults, frozenset({"capturable", "differentiable"}))


RECIPES: Mapping[OptimizerName, Recipe] = {
    "adamw": _torch("AdamW", **{**_ADAMW, "eps": 1e-8}),
    "torch-adam": _torch("Adam", betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8),
    "torch-adamw": _torch("AdamW", betas=(0.9, 0.999), weight_decay=0.01, eps=1e-8),
    "torch-sgd": _torch("SGD", momentum=0.0, weight_decay=0.0),
    "torch-radam": _torch("RAdam", betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8),
    "torch-nadam": _torch("NAdam", betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8, momentum_decay=4e-3),
    "torch-rmsprop": _torch("RMSprop", alpha=0.99, momentum=0.0, weight_decay=0.0, eps=1e-8),
    "torch-adagrad": _torch("Adagrad", lr_decay=0.0, weight_decay=0.0, eps=1e-10),
    "torch-adadelta": _torch("Adadelta", rho=0.9, weight_decay=0.0, eps=1e-6),
    "torch-adafactor": _torch("Adafactor", beta2_decay=-0.8, d=1.0, weight_decay=0.0),
    "torch-adamax": _torch("Adamax", betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8),
    "torch-asgd": _torch("ASGD", lambd=1e-4, alpha=0.75, t0=1e6, weight_decay=0.0),
    "adamw_bf16": Recipe("torchao", "sdxl_pipeline.training.torchao_optimizers", "StochasticAdamW", _ADAMW),
    "adamw_schedulefree": _schedule_free(0.01, 1e-8),
    "adamw_schedulefree+aggressive": _schedule_free(0.001, 1e-6),
    "adamw_schedulefree+no_kahan": _schedule_free(0.001, 1e-6),
    # torch-optimi's Kahan summation is on where weights are bf16, and Lion's everywhere
    "optimi-adam": _optimi("Adam", betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6),
    "optimi-adamw": _optimi("AdamW", betas=(0.9, 0.99), weight_decay=0.01, eps=1e-6),
    "optimi-adan": _optimi("Adan", betas=(0.98, 0.92, 0.999), weight_decay=0.02, eps=1e-6),
    "optimi-lion": _optimi("Lion", betas=(0.9, 0.99), weight_decay=0.0, kahan_sum=True),
    "optimi-radam": _optimi("RAdam", betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6, decouple_wd=True),
    "optimi-ranger": _optimi(
        "Ranger", betas=(0.9, 0.99), weight_decay=0.0, eps=1e-6, k=6, alpha=0.5, decouple_wd=True
    ),
    "optimi-sgd": _optimi("SGD", momentum=0.0, weight_decay=0.0),
    "optimi-stableadamw": _optimi("StableAdamW", betas=(0.9, 0.99), weight_decay=0.01, eps=1e-6),
    "ao-adamw8bit": _torchao("AdamW8bit"),
    "ao-adamw4bit": _torchao("AdamW4bit"),
    "ao-adamfp8": _torchao("AdamFp8"),
    "ao-adamwfp8": _torchao("AdamWFp8"),
    **_bitsandbytes(),  # type: ignore[dict-item]
    # by the method's authors (Mishchenko and Defazio 2023); SimpleTuner takes another author's extension, with options of its own
    "prodigy": Recipe(
        "prodigyopt",
        "prodigyopt",
        "Prodigy",
        {"betas": (0.9, 0.99), "weight_decay": 0.0, "d0": 1e-6, "d_coef": 1.0},
        frozenset({"fsdp_in_use"}),
        frozenset({"d", "d_max", "d_numerator", "d_denom", "d_hat", "k"}),
    ),
    # With its own step size and its scaling by the weights off, since a LoRA's weights begin at zero and learning_rate shall mean
    # what it says (Shazeer and Stern 2018, sections 8 and 9).
    "adafactor": Recipe(
        "transformers",
        "transformers.optimization",
        "Adafactor",
        {"scale_parameter": False, "relative_step": False, "warmup_init": False},
        frozenset({"relative_step", "warmup_init"}),
    ),
}
