"""Settings of a LyCORIS adapter, usually from the file of `lycoris_config`: algorithm and layers.

Names and meanings are those of the lycoris-lora package (Yeh et al. 2023, arXiv:2309.14859). Options that the weights file does not
record, or that the package does not load back correctly, are rejected before the training.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from sdxl_pipeline.config.schema.settings_model import BadValueError, Count, SettingsModel, Share
from sdxl_pipeline.config.simpletuner_schema import KeySchema, UnsupportedKey

Algorithm = Literal["lokr", "loha", "lora", "locon"]
_UNSUPPORTED_ALGORITHMS = frozenset({"dylora", "glora", "full", "diag-oft", "boft", "ia3", "tlora"})
Alpha = Annotated[float, Field(gt=0)]
Factor = Annotated[int, Field(ge=-1)]


class LycorisOverride(SettingsModel):
    """Different values for the layers of one kind of module."""

    algo: Algorithm | None = Field(None, description="Algorithm.")
    dim: Count | None = Field(None, description="Rank.")
    alpha: Alpha | None = Field(None, description="Alpha.")
    factor: Factor | None = Field(None, description="LoKr factor.")
    full_matrix: bool | None = Field(None, description="LoKr's second factor as a full matrix.")
    decompose_both: bool | None = Field(
        None, description="LoKr's first factor as a low-rank product as well."
    )
    use_tucker: bool | None = Field(None, description="Tucker decomposition of convolutions.")


class LycorisPreset(SettingsModel):
    """Layers with an adapter."""

    enable_conv: bool = Field(True, description="Adapt convolutions with a kernel above 1x1 as well.")
    target_module: tuple[str, ...] = Field(
        (),
        description="Class names of modules whose layers are adapted, as Attention, FeedForward, ResnetBlock2D.",
    )
    target_name: tuple[str, ...] = Field(
        (), description="Names of layers or modules: regular expressions, or patterns with use_fnmatch."
    )
    module_algo_map: dict[str, LycorisOverride] = Field(
        default_factory=dict, description="Class name -> different values there: dim, alpha, factor, algo."
    )
    name_algo_map: dict[str, LycorisOverride] = Field(
        default_factory=dict, description="Name or pattern -> different values there."
    )
    exclude_name: tuple[str, ...] = Field((), description="Names of layers without an adapter.")
    use_fnmatch: bool = Field(
        False, description="Names are shell patterns (*.to_q), not regular expressions."
    )
    lora_prefix: Literal["lycoris"] = Field(
        "lycoris", description="Prefix of the tensors in the weights file."
    )

    @field_validator("module_algo_map", "name_algo_map", mode="before")
    @classmethod
    def _read_overrides(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {name: _override(name, options) for name, options in value.items()}


class LycorisSettings(SettingsModel):
    """A LyCORIS adapter."""

    algo: Algorithm = Field(
        description="lokr: Kronecker product; loha: Hadamard product; lora, locon: low-rank product."
    )
    multiplier: float = Field(
        1.0, description="Strength during training; must be 1, since the weights file does not record it."
    )
    linear_dim: Count = Field(
        4, description="Rank; for lokr, a rank above a layer's size (such as 10000) means full matrices."
    )
    linear_alpha: Alpha = Field(
        1.0, description="Updates are scaled by alpha / rank; a full-matrix LoKr is not scaled."
    )
    conv_dim: Count | None = Field(
        None, description="Rank for convolutions above 1x1; not set: as linear_dim."
    )
    conv_alpha: Alpha | None = Field(
        None, description="Alpha for convolutions above 1x1; not set: as linear_alpha."
    )
    factor: Factor = Field(
        -1,
        description="LoKr: a layer's dimensions are split into about factor x remainder; -1: near the square root.",
    )
    full_matrix: bool = Field(False, description="LoKr: the second factor as a full matrix.")
    decompose_both: bool = Field(False, description="LoKr: the first factor as a low-rank product as well.")
    use_tucker: bool = Field(False, description="LoHa, locon: Tucker decomposition of convolutions.")
    use_scalar: bool = Field(
        False, description="A trained scale, which is multiplied into the saved weights."
    )
    dora_wd: bool = Field(False, description="Weight decomposition as in DoRA.")
    bypass_mode: bool | None = Field(
        None,
        description="Add the update to a layer's output, not to its weight; not set: true unless dora_wd.",
    )
    dropout: Share = Field(0.0, description="Dropout of the update's output; needs bypass_mode.")
    rank_dropout: Share = Field(0.0, description="Dropout of rows of the update.")
    module_dropout: Share = Field(0.0, description="Dropout of the update of entire layers.")
    apply_preset: LycorisPreset | None = Field(
        None, description="Layers with an adapter; not set: every linear layer and convolution."
    )

    @property
    def bypasses(self) -> bool:
        """Return whether updates are added to outputs, which is exact in bf16, where W + update would be rounded."""
        return not self.dora_wd if self.bypass_mode is None else self.bypass_mode

    @property
    def algorithms(self) -> frozenset[str]:
        """Return all algorithms in use."""
        return frozenset({self.algo, *(override.algo for override in self.overrides if override.algo)})

    @property
    def overrides(self) -> tuple[LycorisOverride, ...]:
        """Return the overrides of all modules and names."""
        preset = self.apply_preset or LycorisPreset()
        return (*preset.module_algo_map.values(), *preset.name_algo_map.values())

    @field_validator("algo", mode="before")
    @classmethod
    def _require_supported_algorithm(cls, value: Any) -> Any:
        if isinstance(value, str) and value in _UNSUPPORTED_ALGORITHMS:
            known = ", ".join(f'"{name}"' for name in get_args(Algorithm))
            raise BadValueError(f"{value} is not supported", f"write one of {known}")
        return value

    @field_validator("multiplier")
    @classmethod
    def _require_unit_multiplier(cls, value: float) -> float:
        if value != 1:
            raise BadValueError(
                "would train at a strength that the weights file does not record",
                "write 1.0, and set the strength when loading the adapter",
            )
        return value


LYCORIS: Final = KeySchema(
    spellings={"use_cp": "use_tucker", "use_conv_cp": "use_tucker"},
    unsupported={
        "unbalanced_factorization": UnsupportedKey(
            (False, None), "write false: lycoris-lora cannot load such a file"
        ),
        "wd_on_output": UnsupportedKey((True, None), "write true: lycoris-lora cannot load such a file"),
        "train_norm": UnsupportedKey((False, None)),
        "rescaled": UnsupportedKey((False, None)),
        "constraint": UnsupportedKey((0, None)),
        "train_llm_adapter": UnsupportedKey((False, None)),
        "preset": UnsupportedKey((None, "full"), "write the layers in apply_preset"),
    },
    inactive={"block_size": "algo", "tlora_min_rank": "algo", "tlora_alpha": "algo"},
)
"""Keys beyond the fields of `LycorisSettings`."""


def _override(name: str, options: Any) -> LycorisOverride:
    if isinstance(options, LycorisOverride):
        return options
    known = ", ".join(LycorisOverride.model_fields)
    if not isinstance(options, Mapping):
        raise BadValueError(f"{name}: is not an object", f"write an object with any of {known}")
    if unknown := sorted(set(options) - set(LycorisOverride.model_fields)):
        raise BadValueError(
            f"{name}: {', '.join(map(str, unknown))} is not a known key", f"write any of {known}"
        )
    try:
        return LycorisOverride.model_validate(options)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise BadValueError(f"{name}: {detail['loc'][0]}: {detail['msg']}", f"correct {name}") from error
