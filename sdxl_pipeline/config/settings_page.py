"""The page of every accepted key (docs/settings.md), made from the models that accept them, so that it cannot drift from the code."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdxl_pipeline.config.schema.datasets import (
    CaptionShuffle,
    HubColumns,
    ImageDataset,
    ParquetTable,
    TextEmbedsDataset,
)
from sdxl_pipeline.config.schema.key_facts import Key, key_of, keys_with
from sdxl_pipeline.config.schema.lycoris import (
    LYCORIS,
    LycorisOverride,
    LycorisPreset,
    LycorisSettings,
)
from sdxl_pipeline.config.schema.settings_model import SettingsModel
from sdxl_pipeline.config.schema.training import PROFILE_KEYS, SECTIONS, TrainingSettings
from sdxl_pipeline.config.settings_parser import literal_values
from sdxl_pipeline.config.simpletuner_schema import HUGGINGFACE, IMAGES, TEXT_EMBEDS, TRAINING, KeySchema

_TYPE_NAMES = {
    bool: "true / false",
    int: "whole number",
    float: "number",
    str: "text",
    Path: "path",
    dict: "object",
    SecretStr: "secret",
}
_LIMIT_SIGNS = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ ", "multiple_of": "multiple of "}

_INTRODUCTION = """# Settings

This page is made from the code by `sdxl-pipeline settings > docs/settings.md`; a test keeps it up to date.

A project is a folder with two files. `config.json` says how to train, `multidatabackend.json` lists the datasets. Keys and their
meanings are SimpleTuner's; each may be written with or without leading `--`, numbers and booleans also as text (`"1e-4"`, `"true"`),
and `null` or `"none"` stands for "not set". Relative paths are relative to the project's folder. The launchpad of a run goes before
`config.json`, which goes before the hardware profile, which goes before the default; `sdxl-pipeline doctor` shows each value and
where it came from.
"""


_CONFIG_FACTS = """- affects the weights, identity contains: a finished run of the same identity is reused, an unfinished one is resumed. A key that
  affects the weights is part of the identity: its value, or the digest of what it names.
- path: `local` is a path of this machine; `checkpoint` a path; `name or path` a Hub id, or a path if that file or folder exists;
  `base model` the same for the base model.
- run config: the settings of a single run may replace the value.
- profile: the hardware profile gives the value if `config.json` does not.
- length: one of these keys decides how long a run is.
- card, published: the model card shows the value; the release contains it (of a name or path only the last part).
- only with, needs: the value has no effect with another `lora_type`, or if a key that it needs is off.
- also part of: the code version of these assets, or the identity of the evaluation (`run_evaluation`: with the run's value), contains
  the value, so changing it marks them as stale.
"""

_DATASET_FACTS = """- default: the key of the same name in `config.json` gives the value if the entry does not (`size`: only if `resolution_type` is the
  same).
- masks: an entry of masks uses the value of its images' entry (`of image`), or none (`unused`).
- part of: the code version of these assets, the name of the download folder (`source`) or the digest of the recorded scan (`scan`)
  contains the value.
"""

_Column = tuple[str, Callable[[Key], str]]

_CONFIG_COLUMNS: Final[tuple[_Column, ...]] = (
    ("affects the weights", lambda key: "yes" if key.identity.affects_weights else "no"),
    ("identity contains", lambda key: key.identity.value),
    ("path", lambda key: key.path or ""),
    ("run config", lambda key: "yes" if key.overridable else "no"),
    ("profile", lambda key: "yes" if key.profile else ""),
    ("length", lambda key: "yes" if key.length else ""),
    ("card", lambda key: "yes" if key.on_card else ""),
    ("published", lambda key: "yes" if key.is_published else "no"),
    ("only with", lambda key: f"lora_type {key.lora_type}" if key.lora_type else ""),
    ("needs", lambda key: ", ".join(f"`{name}`" for name in key.needs)),
    ("also part of", lambda key: ", ".join(key.used_by)),
)

_DATASET_COLUMNS: Final[tuple[_Column, ...]] = (
    (
        "default",
        lambda key: {"value": "config.json", "size": "config.json, size"}.get(key.inherited or "", ""),
    ),
    ("masks", lambda key: key.masks or ""),
    ("part of", lambda key: ", ".join(key.used_by)),
)


def settings_page() -> str:
    """The page as Markdown."""
    profile = ", ".join(f"`{key}`" for key in PROFILE_KEYS)
    shared = ", ".join(f"`{key}`" for key in keys_with(ImageDataset, lambda key: key.inherited))
    return "\n".join(
        [
            _INTRODUCTION,
            "## config.json\n",
            f"Not set, these are the hardware profile's: {profile}.\n",
            *(
                line
                for section in SECTIONS
                for line in (f"### {(section.__doc__ or '').rstrip('.')}\n", *_table(section, TRAINING), "")
            ),
            "## The file of lycoris_config\n",
            *_table(LycorisSettings, LYCORIS),
            "\n### `apply_preset`: the layers\n",
            *_table(LycorisPreset, KeySchema()),
            "\n### An entry of `module_algo_map` or `name_algo_map`\n",
            *_table(LycorisOverride, KeySchema()),
            "\n## multidatabackend.json: images\n",
            f"An entry without one of these takes it over from `config.json`: {shared}. Sizes are taken over where `resolution_type`",
            "is the same.\n",
            *_table(ImageDataset, IMAGES),
            "\n### `parquet`: a table of captions\n",
            *_table(ParquetTable, KeySchema()),
            "\n### `huggingface`: columns of a dataset repository\n",
            *_table(HubColumns, HUGGINGFACE),
            "\n### `caption_shuffle`: the order of tags\n",
            *_table(CaptionShuffle, KeySchema()),
            "\n## multidatabackend.json: text embeddings\n",
            *_table(TextEmbedsDataset, TEXT_EMBEDS),
            "## How the keys of config.json are used\n",
            _CONFIG_FACTS,
            *_facts_table(TrainingSettings, _CONFIG_COLUMNS),
            "\n## How the keys of multidatabackend.json are used\n",
            _DATASET_FACTS,
            *_facts_table(ImageDataset, _DATASET_COLUMNS),
            "\n### Text embeddings\n",
            *_facts_table(TextEmbedsDataset, _DATASET_COLUMNS[:1]),
            "\n## Not available yet\n",
            "These are accepted with a value that means off, so that a file which spells out a default works; any other value is",
            "refused. Keys that only tune one of them are accepted with it.\n",
            *_later_table(),
            "\n## Accepted without effect\n",
            "`sdxl-pipeline doctor` warns of these, and says what happens instead.\n",
            "| file | key | instead |",
            "|---|---|---|",
            *(f"| config.json | `{key}` | {instead} |" for key, instead in TRAINING.instead.items()),
            "",
        ]
    )


def _table(model: type[SettingsModel], vocabulary: KeySchema) -> list[str]:
    spellings = {name: other for other, name in vocabulary.spellings.items()}
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        name = f"`{key}`" + (f" (`{spellings[key]}`)" if key in spellings else "")
        cells = (name, _type(field), _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def _facts_table(model: type[SettingsModel], columns: Sequence[_Column]) -> list[str]:
    """Return a Markdown table with the facts of each key."""
    rows = [("key", *(title for title, _ in columns)), ("---",) * (len(columns) + 1)]
    for name, field in model.model_fields.items():
        rows.append((f"`{name}`", *(text(key_of(field)) for _, text in columns)))
    return [f"| {' | '.join(row)} |" for row in rows]


def _later_table() -> list[str]:
    rows = ["| file | key | off |", "|---|---|---|"]
    places = (
        ("config.json", TRAINING),
        ("lycoris_config", LYCORIS),
        ("images", IMAGES),
        ("images, `huggingface`", HUGGINGFACE),
        ("text embeddings", TEXT_EMBEDS),
    )
    for place, vocabulary in places:
        for key, later in sorted(vocabulary.later.items()):
            rows.append(f"| {place} | `{key}` | `{json.dumps(later.off[0])}` |")
        for key, values in sorted(vocabulary.later_values.items()):
            names = ", ".join(f"`{value}`" for value in sorted(values))
            rows.append(f"| {place} | `{key}` | not yet: {names} |")
    return rows


def _type(field: FieldInfo) -> str:
    if values := literal_values(field.annotation):
        words = " / ".join(f"`{value}`" for value in values)
        return f"list of {words}" if get_origin(field.annotation) is tuple else words
    limits = [*field.metadata, *_inner_limits(field.annotation)]
    signs = [
        f"{sign}{getattr(limit, name):g}"
        for limit in limits
        for name, sign in _LIMIT_SIGNS.items()
        if hasattr(limit, name)
    ]
    return " ".join([_type_name(field.annotation), ", ".join(signs)]).strip()


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return _type_name(next(member for member in get_args(annotation) if member is not type(None)))
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    if origin is tuple:
        return f"list of {_type_name(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, SettingsModel):
        return "object (below)"
    return _TYPE_NAMES[origin or annotation]


def _inner_limits(annotation: Any) -> list[Any]:
    """The constraints inside a union such as `Annotated[int, Field(ge=1)] | None`."""
    found: list[Any] = []
    for member in get_args(annotation):
        for extra in getattr(member, "__metadata__", ()):
            found += extra.metadata if isinstance(extra, FieldInfo) else [extra]
    return found


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return f"`{', '.join(value)}`" if value else "none"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value)}`"
