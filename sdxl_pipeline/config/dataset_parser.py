"""`multidatabackend.json` read into datasets: every entry, what it takes over from `config.json`, and what entries say of each other."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.paths import inside
from sdxl_pipeline.config.problems import NO_VALUE, Problem
from sdxl_pipeline.config.schema.datasets import (
    HubColumns,
    ImageDataset,
    TextEmbedsDataset,
    asset_name,
)
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.settings_model import SettingsModel
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_parser import ParsedSettings, parse_settings
from sdxl_pipeline.config.simpletuner_schema import HUGGINGFACE, IMAGES, TEXT_EMBEDS
from sdxl_pipeline.config.validators.dataset_rules import check_images
from sdxl_pipeline.config.validators.mask_rules import (
    check_image_entry,
    check_mask_entry,
    check_mask_links,
    mask_source,
    unused_mask_settings,
)
from sdxl_pipeline.config.validators.unused_dataset_settings import (
    find_unused_dataset_settings,
    unused_across_entries,
    unused_mask_entry_settings,
)

D = TypeVar("D", bound=SettingsModel)

_WHAT = "a list of datasets, each an object with an id and an instance_data_dir"
_TYPES = ("image", "eval", "conditioning", "text_embeds")
_STORED_ELSEWHERE = ("aws", "csv", "huggingface", "webshart", "memory")
_INHERITED = keys_with(ImageDataset, lambda key: key.inherited == "value")
_INHERITED_SIZES = keys_with(ImageDataset, lambda key: key.inherited == "size")
_TEXT_INHERITED = keys_with(TextEmbedsDataset, lambda key: key.inherited)


@dataclass
class ParsedDatasets:
    """The entries of a datasets file that are not disabled, in the file's order, and what is wrong with the file."""

    images: list[ImageDataset] = field(default_factory=list)
    masks: list[ImageDataset] = field(default_factory=list)
    text_embeds: list[TextEmbedsDataset] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    written: dict[str, Collection[str]] = field(default_factory=dict)
    """The keys that stand in each entry of images or masks, by its id."""
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of `warnings` that are about settings of one entry without effect, by its id."""


def parse_datasets(path: Path, folder: Path, training: TrainingSettings, config_file: Path) -> ParsedDatasets:
    """Read the datasets file at `path` of the project in `folder`; relative paths in it are relative to that folder."""
    reading = ParsedDatasets()
    content, reading.problems = read_json(path, _WHAT)
    if content is None:
        return reading
    if not isinstance(content, list):
        reading.problems.append(
            Problem(path, "", NO_VALUE, f"holds {_kind(content)}, not a list", f"write {_WHAT}")
        )
        return reading
    seen: dict[str, str] = {}
    asset_names: dict[str, str] = {}
    for position, raw in enumerate(content, start=1):
        if not isinstance(raw, Mapping):
            reading.problems.append(
                Problem(path, f"[{position}]", raw, f"is {_kind(raw)}, not an object", f"write {_WHAT}")
            )
            continue
        named = {key.lstrip("-"): value for key, value in raw.items()}
        name = named.get("id")
        where = f"[{position}]" if not isinstance(name, str) else f'[{position}] "{name}"'
        if isinstance(name, str):
            _check_name(
                name,
                where,
                seen,
                asset_names,
                path,
                reading,
                has_assets=named.get("dataset_type") != "text_embeds",
            )
        if not _is_true(named.get("disabled", named.get("disable", False))):
            _read_entry(raw, named, f"{where}.", path, folder, training, config_file, reading)
    _check_together(seen, path, reading)
    _find_unused(seen, path, training, config_file, reading)
    reading.warnings += [
        f"{config_file.name}: {idle}" for idle in unused_mask_settings(training, reading.images)
    ]
    return reading


def _check_name(
    name: str,
    where: str,
    seen: dict[str, str],
    asset_names: dict[str, str],
    path: Path,
    reading: ParsedDatasets,
    has_assets: bool,
) -> None:
    if name in seen:
        message = f"the id is already that of entry {seen[name]}"
        reading.problems.append(
            Problem(path, f"{where}.id", name, message, "give each entry an id of its own")
        )
        return
    seen[name] = where
    if not has_assets:
        return
    asset = asset_name(name)
    if asset in asset_names:
        message = f"its assets would have the name {asset}, which those of entry {asset_names[asset]} have"
        hint = "use letters, digits and underscores that tell the two ids apart"
        reading.problems.append(Problem(path, f"{where}.id", name, message, hint))
    asset_names.setdefault(asset, where)


def _read_entry(
    raw: Mapping[str, Any],
    named: Mapping[str, Any],
    where: str,
    path: Path,
    folder: Path,
    training: TrainingSettings,
    config_file: Path,
    reading: ParsedDatasets,
) -> None:
    dataset_type = named.get("dataset_type", "image")
    if dataset_type == "text_embeds":
        texts = parse_settings(
            _on_this_machine(raw, named, where, path, reading),
            TextEmbedsDataset,
            TEXT_EMBEDS,
            path,
            where,
            {key: getattr(training, key) for key in _TEXT_INHERITED},
        )
        _take_findings(texts, reading)
        if texts.settings:
            reading.text_embeds.append(_absolute(texts.settings, folder))
        return
    if dataset_type == "image_embeds":  # in the reference it only says where latents are kept
        reading.warnings.append(
            f"{path.name}: {where}dataset_type image_embeds has no effect: latents are kept in the image dataset's cache_dir_vae"
        )
        return
    if dataset_type not in _TYPES:
        message = (
            "is not for SDXL LoRA yet"
            if isinstance(dataset_type, str) and dataset_type in IMAGES.later_values["dataset_type"]
            else "is not a known dataset_type"
        )
        hint = f"write one of {', '.join(_TYPES)}, or disable the entry"
        reading.problems.append(Problem(path, f"{where}dataset_type", dataset_type, message, hint))
        return
    images = parse_settings(
        _with_hub_columns(raw, named, where, path, reading),
        ImageDataset,
        IMAGES,
        path,
        where,
        _inherited(named, training, where, reading),
        _belongs_in_config(),
    )
    _take_findings(images, reading)
    if images.settings is None:
        return
    is_mask = images.settings.dataset_type == "conditioning"
    entry = mask_source(images.settings) if is_mask else images.settings
    beside = check_mask_entry(entry) if is_mask else check_image_entry(entry)
    for finding in (*check_images(entry), *beside):
        if finding.key in images.spelled:
            place, key = path, f"{where}{images.spelled[finding.key]}"
        elif getattr(training, finding.key, None) is not None and finding.key in training.model_fields_set:
            place, key = config_file, finding.key
        else:
            place, key = path, f"{where}{finding.key}"
        if any(problem.key == key for problem in images.problems):
            continue  # a value that could not be read stands there
        value = getattr(entry, finding.key)
        shown = NO_VALUE if value is None else value
        reading.problems.append(Problem(place, key, shown, finding.message, finding.hint))
    reading.written[entry.id] = frozenset(images.spelled)
    (reading.masks if is_mask else reading.images).append(_absolute(entry, folder))


def _on_this_machine(
    raw: Mapping[str, Any], named: Mapping[str, Any], where: str, path: Path, reading: ParsedDatasets
) -> Mapping[str, Any]:
    """Return a text_embeds entry without the storage elsewhere that it names: embeddings are kept here, where they are used."""
    kind = named.get("type", "local")
    if kind not in _STORED_ELSEWHERE:
        return raw
    reading.warnings.append(
        f"{path.name}: {where}type {kind} has no effect: embeddings are kept on this machine, in the storage's text store"
    )
    return {key: value for key, value in raw.items() if key.lstrip("-") not in ("type", "cache_dir")}


def _with_hub_columns(
    raw: Mapping[str, Any], named: Mapping[str, Any], where: str, path: Path, reading: ParsedDatasets
) -> Mapping[str, Any]:
    """Return the entry with what its object `huggingface` says beside its own keys."""
    written = named.get("huggingface")
    if not isinstance(written, Mapping):
        return raw
    entry = {key: value for key, value in raw.items() if key.lstrip("-") != "huggingface"}
    columns = parse_settings(written, HubColumns, HUGGINGFACE, path, f"{where}huggingface.")
    _take_findings(columns, reading)
    if named.get("type") != "huggingface":
        reading.warnings.append(f"{path.name}: {where}huggingface has no effect beside another type")
        return entry
    found = columns.settings.model_dump(exclude_none=True) if columns.settings else {}
    return entry | {key: value for key, value in found.items() if named.get(key) is None}


def _take_findings(found: "ParsedSettings[Any]", reading: ParsedDatasets) -> None:
    reading.problems += found.problems
    reading.warnings += found.warnings


def _inherited(
    raw: Mapping[str, Any], training: TrainingSettings, where: str, reading: ParsedDatasets
) -> dict[str, Any]:
    """What the entry takes over from config.json. Sizes are taken over only in their own unit."""
    given = training.model_fields_set
    values: dict[str, Any] = {key: getattr(training, key) for key in _INHERITED if key in given}
    unit = raw.get("resolution_type", training.resolution_type)
    values["resolution_type"] = training.resolution_type
    if unit == training.resolution_type:
        values |= {
            key: getattr(training, key) for key in _INHERITED_SIZES if key in given or key == "resolution"
        }
        return values
    values["resolution"] = 1.0 if unit == "area" else 1024.0
    for key in _INHERITED_SIZES:
        if key in given and key not in raw:
            reading.warnings.append(
                f"{where}{key} does not take over {key} of config.json, whose unit is {training.resolution_type} and not {unit}"
            )
    return values


def _belongs_in_config() -> dict[str, str]:
    return dict.fromkeys(TrainingSettings.model_fields, "config.json: it holds for the whole training")


def _check_together(places: Mapping[str, str], path: Path, reading: ParsedDatasets) -> None:
    """What the entries say of each other; `places` says where each id stands in the file."""
    problems = reading.problems
    if not problems and not any(dataset.dataset_type == "image" for dataset in reading.images):
        hint = 'add an entry with "dataset_type": "image" that is not disabled'
        problems.append(Problem(path, "", NO_VALUE, "holds no images to train on", hint))
    defaults = [entry.id for entry in reading.text_embeds if entry.default]
    for other in defaults[1:]:
        message = f"entry {places[defaults[0]]} is the default already"
        problems.append(Problem(path, f"{places[other]}.default", True, message, "keep one default"))
    for link in check_mask_links(reading.images, reading.masks, reading.written):
        where = f"{places[link.id]}.{link.key}" if link.key else places[link.id]
        if link.hint:
            entry = next(each for each in (*reading.images, *reading.masks) if each.id == link.id)
            problems.append(Problem(path, where, getattr(entry, link.key), link.message, link.hint))
        else:
            reading.warnings.append(f"{path.name}: {where}: {link.message}")
    known = [entry.id for entry in reading.text_embeds]
    for dataset in reading.images:
        if dataset.text_embeds is not None and dataset.text_embeds not in known:
            hint = (
                f"write one of {', '.join(known)}"
                if known
                else "leave it out, or add a text_embeds entry of that id"
            )
            message = "names no text_embeds entry"
            problems.append(
                Problem(path, f"{places[dataset.id]}.text_embeds", dataset.text_embeds, message, hint)
            )


def _find_unused(
    places: Mapping[str, str],
    path: Path,
    training: TrainingSettings,
    config_file: Path,
    reading: ParsedDatasets,
) -> None:
    """Add a warning for each setting without effect: those of an entry, and those of config.json that no entry uses."""
    found = [*unused_across_entries(reading.images, reading.text_embeds)]
    inherited: dict[str, list[str]] = {}
    for dataset in reading.images:
        written = reading.written[dataset.id]
        found += find_unused_dataset_settings(dataset, written)
        shared = [name for name in _INHERITED if name in training.model_fields_set and name not in written]
        reasons = {idle.key: idle.reason for idle in find_unused_dataset_settings(dataset, shared)}
        for name in shared:
            inherited.setdefault(name, []).append(reasons.get(name, ""))
    for entry in reading.masks:
        found += unused_mask_entry_settings(entry, reading.written[entry.id])
    for id_, key, reason in found:
        place = places[id_]
        warning = (
            f"{path.name}: {place}.{key} has no effect: {reason}" if key else f"{path.name}: {place} {reason}"
        )
        reading.warnings.append(warning)
        reading.unused[id_] = (*reading.unused.get(id_, ()), warning)
    reading.warnings += [
        f"{config_file.name}: {key} has no effect: in every dataset without its own, {why[0]}"
        for key, why in inherited.items()
        if all(why)
    ]


def _absolute(settings: D, folder: Path) -> D:
    """Return the settings with all paths absolute; relative ones are relative to `folder`."""
    paths = {key: inside(folder, value) for key, value in settings if isinstance(value, Path)}
    return settings.model_copy(update=paths)


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() == "true")


def _kind(content: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return next((name for kind, name in names.items() if isinstance(content, kind)), "a number")
