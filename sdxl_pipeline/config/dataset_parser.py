"""Parser of `multidatabackend.json`: the entries, the defaults they inherit from `config.json`, and references between entries."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.paths import resolve_path
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

_EXPECTED = "a list of datasets, each an object with an id and an instance_data_dir"
_TYPES = ("image", "eval", "conditioning", "text_embeds")
_REMOTE_TYPES = ("aws", "csv", "huggingface", "webshart", "memory")
_INHERITED = keys_with(ImageDataset, lambda key: key.inherited == "value")
_INHERITED_SIZES = keys_with(ImageDataset, lambda key: key.inherited == "size")
_TEXT_INHERITED = keys_with(TextEmbedsDataset, lambda key: key.inherited)


@dataclass
class ParsedDatasets:
    """The enabled entries of a datasets file in the file's order, with problems and warnings."""

    images: list[ImageDataset] = field(default_factory=list)
    masks: list[ImageDataset] = field(default_factory=list)
    text_embeds: list[TextEmbedsDataset] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    written: dict[str, Collection[str]] = field(default_factory=dict)
    """The keys written in each entry of images or masks, by id."""
    unused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Those of `warnings` about unused settings of an entry, by id."""


def parse_datasets(path: Path, folder: Path, training: TrainingSettings, config_file: Path) -> ParsedDatasets:
    """Parse the datasets file at `path` of the project in `folder`; relative paths in it are relative to that folder."""
    parsed = ParsedDatasets()
    content, parsed.problems = read_json(path, _EXPECTED)
    if content is None:
        return parsed
    if not isinstance(content, list):
        parsed.problems.append(
            Problem(path, "", NO_VALUE, f"contains {_json_type(content)}, not a list", f"write {_EXPECTED}")
        )
        return parsed
    seen: dict[str, str] = {}
    asset_names: dict[str, str] = {}
    for position, raw in enumerate(content, start=1):
        if not isinstance(raw, Mapping):
            parsed.problems.append(
                Problem(
                    path, f"[{position}]", raw, f"is {_json_type(raw)}, not an object", f"write {_EXPECTED}"
                )
            )
            continue
        by_name = {key.lstrip("-"): value for key, value in raw.items()}
        name = by_name.get("id")
        where = f"[{position}]" if not isinstance(name, str) else f'[{position}] "{name}"'
        if isinstance(name, str):
            _check_name(
                name,
                where,
                seen,
                asset_names,
                path,
                parsed,
                has_assets=by_name.get("dataset_type") != "text_embeds",
            )
        if not _is_true(by_name.get("disabled", by_name.get("disable", False))):
            _parse_entry(raw, by_name, f"{where}.", path, folder, training, config_file, parsed)
    _check_references(seen, path, parsed)
    _find_unused(seen, path, training, config_file, parsed)
    parsed.warnings += [
        f"{config_file.name}: {unused}" for unused in unused_mask_settings(training, parsed.images)
    ]
    return parsed


def _check_name(
    name: str,
    where: str,
    seen: dict[str, str],
    asset_names: dict[str, str],
    path: Path,
    parsed: ParsedDatasets,
    has_assets: bool,
) -> None:
    if name in seen:
        message = f"the id is already that of entry {seen[name]}"
        parsed.problems.append(
            Problem(path, f"{where}.id", name, message, "give each entry an id of its own")
        )
        return
    seen[name] = where
    if not has_assets:
        return
    asset = asset_name(name)
    if asset in asset_names:
        message = f"its assets would be named {asset}, like those of entry {asset_names[asset]}"
        hint = "use letters, digits and underscores that distinguish the two ids"
        parsed.problems.append(Problem(path, f"{where}.id", name, message, hint))
    asset_names.setdefault(asset, where)


def _parse_entry(
    raw: Mapping[str, Any],
    by_name: Mapping[str, Any],
    where: str,
    path: Path,
    folder: Path,
    training: TrainingSettings,
    config_file: Path,
    parsed: ParsedDatasets,
) -> None:
    dataset_type = by_name.get("dataset_type", "image")
    if dataset_type == "text_embeds":
        texts = parse_settings(
            _without_remote_storage(raw, by_name, where, path, parsed),
            TextEmbedsDataset,
            TEXT_EMBEDS,
            path,
            where,
            {key: getattr(training, key) for key in _TEXT_INHERITED},
        )
        _add_findings(texts, parsed)
        if texts.settings:
            parsed.text_embeds.append(_absolute(texts.settings, folder))
        return
    if dataset_type == "image_embeds":  # SimpleTuner's location of the latents
        parsed.warnings.append(
            f"{path.name}: {where}dataset_type image_embeds has no effect: latents are stored in the image dataset's cache_dir_vae"
        )
        return
    if dataset_type not in _TYPES:
        message = (
            "is not supported for SDXL"
            if isinstance(dataset_type, str) and dataset_type in IMAGES.unsupported_values["dataset_type"]
            else "is not a known dataset_type"
        )
        hint = f"write one of {', '.join(_TYPES)}, or disable the entry"
        parsed.problems.append(Problem(path, f"{where}dataset_type", dataset_type, message, hint))
        return
    images = parse_settings(
        _with_hub_columns(raw, by_name, where, path, parsed),
        ImageDataset,
        IMAGES,
        path,
        where,
        _inherited(by_name, training, where, parsed),
        _config_keys(),
    )
    _add_findings(images, parsed)
    if images.settings is None:
        return
    is_mask = images.settings.dataset_type == "conditioning"
    entry = mask_source(images.settings) if is_mask else images.settings
    findings = check_mask_entry(entry) if is_mask else check_image_entry(entry)
    for finding in (*check_images(entry), *findings):
        if finding.key in images.spelled:
            file, key = path, f"{where}{images.spelled[finding.key]}"
        elif getattr(training, finding.key, None) is not None and finding.key in training.model_fields_set:
            file, key = config_file, finding.key
        else:
            file, key = path, f"{where}{finding.key}"
        if any(problem.key == key for problem in images.problems):
            continue  # its value is invalid and reported already
        value = getattr(entry, finding.key)
        displayed = NO_VALUE if value is None else value
        parsed.problems.append(Problem(file, key, displayed, finding.message, finding.hint))
    parsed.written[entry.id] = frozenset(images.spelled)
    (parsed.masks if is_mask else parsed.images).append(_absolute(entry, folder))


def _without_remote_storage(
    raw: Mapping[str, Any], by_name: Mapping[str, Any], where: str, path: Path, parsed: ParsedDatasets
) -> Mapping[str, Any]:
    """Return a text_embeds entry without remote storage, with a warning: embeddings are stored on this machine."""
    kind = by_name.get("type", "local")
    if kind not in _REMOTE_TYPES:
        return raw
    parsed.warnings.append(
        f"{path.name}: {where}type {kind} has no effect: embeddings are stored on this machine, in the text store of the storage resource"
    )
    return {key: value for key, value in raw.items() if key.lstrip("-") not in ("type", "cache_dir")}


def _with_hub_columns(
    raw: Mapping[str, Any], by_name: Mapping[str, Any], where: str, path: Path, parsed: ParsedDatasets
) -> Mapping[str, Any]:
    """Return the entry with the values of its object `huggingface` for keys that it does not set itself."""
    written = by_name.get("huggingface")
    if not isinstance(written, Mapping):
        return raw
    entry = {key: value for key, value in raw.items() if key.lstrip("-") != "huggingface"}
    columns = parse_settings(written, HubColumns, HUGGINGFACE, path, f"{where}huggingface.")
    _add_findings(columns, parsed)
    if by_name.get("type") != "huggingface":
        parsed.warnings.append(f"{path.name}: {where}huggingface has no effect with another type")
        return entry
    found = columns.settings.model_dump(exclude_none=True) if columns.settings else {}
    return entry | {key: value for key, value in found.items() if by_name.get(key) is None}


def _add_findings(found: "ParsedSettings[Any]", parsed: ParsedDatasets) -> None:
    parsed.problems += found.problems
    parsed.warnings += found.warnings


def _inherited(
    raw: Mapping[str, Any], training: TrainingSettings, where: str, parsed: ParsedDatasets
) -> dict[str, Any]:
    """Return the values that the entry inherits from config.json; sizes only if their unit is the same."""
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
            parsed.warnings.append(
                f"{where}{key} does not inherit {key} of config.json, whose unit is {training.resolution_type} and not {unit}"
            )
    return values


def _config_keys() -> dict[str, str]:
    return dict.fromkeys(TrainingSettings.model_fields, "config.json: it applies to the entire training")


def _check_references(locations: Mapping[str, str], path: Path, parsed: ParsedDatasets) -> None:
    """Check references between entries; `locations` has the position of each id in the file."""
    problems = parsed.problems
    if not problems and not any(dataset.dataset_type == "image" for dataset in parsed.images):
        hint = 'add an entry with "dataset_type": "image" that is not disabled'
        problems.append(Problem(path, "", NO_VALUE, "contains no images to train on", hint))
    defaults = [entry.id for entry in parsed.text_embeds if entry.default]
    for other in defaults[1:]:
        message = f"entry {locations[defaults[0]]} is already the default"
        problems.append(Problem(path, f"{locations[other]}.default", True, message, "keep one default"))
    for link in check_mask_links(parsed.images, parsed.masks, parsed.written):
        where = f"{locations[link.id]}.{link.key}" if link.key else locations[link.id]
        if link.hint:
            entry = next(each for each in (*parsed.images, *parsed.masks) if each.id == link.id)
            problems.append(Problem(path, where, getattr(entry, link.key), link.message, link.hint))
        else:
            parsed.warnings.append(f"{path.name}: {where}: {link.message}")
    known = [entry.id for entry in parsed.text_embeds]
    for dataset in parsed.images:
        if dataset.text_embeds is not None and dataset.text_embeds not in known:
            hint = (
                f"write one of {', '.join(known)}"
                if known
                else "remove it, or add a text_embeds entry with that id"
            )
            message = "is the id of no text_embeds entry"
            problems.append(
                Problem(path, f"{locations[dataset.id]}.text_embeds", dataset.text_embeds, message, hint)
            )


def _find_unused(
    locations: Mapping[str, str],
    path: Path,
    training: TrainingSettings,
    config_file: Path,
    parsed: ParsedDatasets,
) -> None:
    """Add a warning for each unused setting: those of an entry, and those of config.json that no entry uses."""
    found = [*unused_across_entries(parsed.images, parsed.text_embeds)]
    inherited: dict[str, list[str]] = {}
    for dataset in parsed.images:
        written = parsed.written[dataset.id]
        found += find_unused_dataset_settings(dataset, written)
        shared = [name for name in _INHERITED if name in training.model_fields_set and name not in written]
        reasons = {unused.key: unused.reason for unused in find_unused_dataset_settings(dataset, shared)}
        for name in shared:
            inherited.setdefault(name, []).append(reasons.get(name, ""))
    for entry in parsed.masks:
        found += unused_mask_entry_settings(entry, parsed.written[entry.id])
    for id_, key, reason in found:
        where = locations[id_]
        warning = (
            f"{path.name}: {where}.{key} has no effect: {reason}" if key else f"{path.name}: {where} {reason}"
        )
        parsed.warnings.append(warning)
        parsed.unused[id_] = (*parsed.unused.get(id_, ()), warning)
    parsed.warnings += [
        f"{config_file.name}: {key} has no effect: in every dataset that inherits it, {why[0]}"
        for key, why in inherited.items()
        if all(why)
    ]


def _absolute(settings: D, folder: Path) -> D:
    """Return the settings with all paths absolute; relative ones are relative to `folder`."""
    paths = {key: resolve_path(folder, value) for key, value in settings if isinstance(value, Path)}
    return settings.model_copy(update=paths)


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.strip().lower() == "true")


def _json_type(content: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return next((name for kind, name in names.items() if isinstance(content, kind)), "a number")
