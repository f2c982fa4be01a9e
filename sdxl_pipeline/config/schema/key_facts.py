"""Facts about a settings key, attached to its field as `Annotated[int, Key(...)]`, and the queries for keys with a fact.

The run's identity, path completion, run config, hardware profiles, model card, published settings, code versions of assets and
docs/settings.md read these facts, so adding a key is one edit of its field.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from typing import Final, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo


class Identity(Enum):
    """What a run's identity contains for a key of config.json. Each value is its text in docs/settings.md."""

    VALUE = "value"
    VALUE_IF_SET = "value, if it is not the default"
    EFFECTIVE_VALUE = "value, with the default filled in"
    FILE_CONTENT = "digest of the file"
    LATENT_KEYS = "keys of the latents"
    BASE_MODEL = "digest of the base model"
    SAMPLES = "keys and sizes of the samples"
    SAMPLING_WEIGHTS = "sampling weights of the datasets"
    COMPUTE = "none: speed and memory only"
    SAVING = "none: when and where to save"
    VALIDATION = "none: images and scores do not affect the training"
    EXPORT = "none: file format of the weights"
    REPORTING = "none: uploads, messages and schedule"

    @property
    def affects_weights(self) -> bool:
        """Whether the key may change the trained weights."""
        return not self.value.startswith("none")


COMPARED_BY_VALUE: Final = frozenset(
    (
        Identity.VALUE,
        Identity.VALUE_IF_SET,
        Identity.EFFECTIVE_VALUE,
        Identity.FILE_CONTENT,
        Identity.LATENT_KEYS,
    )
)
"""Two runs that differ in such a key differ in their weights. The base model and the data are compared by digest instead."""

PathKind = Literal["local", "checkpoint", "name or path", "base model"]
"""local: a path of this machine, which is not published; checkpoint: a local path, published by its last name; name or path: a Hub id, or a
path where a file or folder of that name exists; base model: the same, resolved with the base model."""

Consumer = Literal[
    "source",
    "scan",
    "dataset",
    "masks",
    "aspect_buckets",
    "training_plan",
    "lora",
    "evaluation",
    "run_evaluation",
    "evaluation_checks",
    "hub_release",
]
"""Code versions and digests that contain a key beside the run's identity. source: name of the download folder; scan: digest of the
recorded scan; run_evaluation: identity of the evaluation, with the value that the run was trained with; evaluation_checks: code version of evaluation,
but not its identity; others: assets of that name."""


@dataclass(frozen=True)
class Key:
    """What the pipeline does with a settings key, beside validating its value."""

    identity: Identity = Identity.VALUE
    """What the run's identity contains for it. Used for config.json only."""
    _: KW_ONLY
    path: PathKind | None = None
    """Which kind of path its text may be; None for fields of type Path, which need no mark, and for other text."""
    overridable: bool = True
    """Whether a run config may set it. False where the base model, the datasets or other assets read it before the run starts."""
    profile: bool = False
    """Whether the hardware profile's field of the same name gives its value where config.json does not."""
    length: bool = False
    """Whether it sets the length of the run."""
    on_card: bool = False
    """Whether the model card shows it."""
    published: bool = True
    """Whether the release contains its value. Local paths are never published."""
    lora_type: Literal["standard", "lycoris"] | None = None
    """The only `lora_type` that it applies to."""
    needs: tuple[str, ...] = ()
    """The keys that switch it on: it has no effect where one of them is off."""
    inherited: Literal["value", "size"] | None = None
    """On a dataset's field: it takes the value of the same key of config.json. size: only if `resolution_type` is the same."""
    masks: Literal["of image", "unused"] | None = None
    """On a dataset's field, for entries of masks. of image: the value of the images' entry is used; unused: it has no effect."""
    used_by: tuple[Consumer, ...] = ()
    """What else contains its value."""

    @property
    def is_published(self) -> bool:
        """Whether the release contains the value, in full or by its last name."""
        return self.published and self.path != "local"


_DEFAULT: Final = Key()


def key_of(field: FieldInfo) -> Key:
    """Return the facts of a field; the defaults of `Key` where its annotation has none."""
    return next((entry for entry in field.metadata if isinstance(entry, Key)), _DEFAULT)


def keys_with(model: type[BaseModel], fact: Callable[[Key], object]) -> tuple[str, ...]:
    """Return the names of the fields of `model` for which `fact` is true, in the model's order."""
    return tuple(name for name, field in model.model_fields.items() if fact(key_of(field)))


def keys_used_by(model: type[BaseModel], consumer: Consumer) -> set[str]:
    """Return the names of the fields of `model` whose values `consumer` contains."""
    return set(keys_with(model, lambda key: consumer in key.used_by))
