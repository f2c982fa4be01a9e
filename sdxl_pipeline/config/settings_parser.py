"""Parser of an object of a user's file into a settings model: aliases, unknown keys, and readable validation errors."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sdxl_pipeline.config.problems import NO_VALUE, Problem
from sdxl_pipeline.config.schema.settings_model import BadValueError, SettingsModel
from sdxl_pipeline.config.simpletuner_schema import KeySchema

M = TypeVar("M", bound=SettingsModel)

_NUMBER_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text"}
_LIMITS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
    "too_short": ("min_length", "of a length of at least"),
    "string_too_short": ("min_length", "of a length of at least"),
    "string_too_long": ("max_length", "of a length of at most"),
}


@dataclass
class ParsedSettings(Generic[M]):
    """A parsed object: the settings (None if a required key is missing or invalid), and each key as it was written."""

    settings: M | None
    spelled: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_settings(
    raw: Mapping[str, Any],
    model: type[M],
    schema: KeySchema,
    file: Path,
    where: str = "",
    inherited: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> ParsedSettings[M]:
    """Parse one object into `model`.

    `where` precedes each key in problems. `inherited` has values for keys that the object does not set. `elsewhere` maps keys of other
    files or objects to their location. If some keys are invalid, the settings contain the remaining ones, so that later checks can
    report further problems; `problems` is then not empty.
    """
    parsed: ParsedSettings[M] = ParsedSettings(None)
    values: dict[str, Any] = {}
    for spelled, value in raw.items():
        _classify_key(spelled, value, values, parsed, model, schema, file, where, elsewhere or {})
    for key, value in (inherited or {}).items():
        if value is not None:
            values.setdefault(key, value)
    try:
        parsed.settings = model.model_validate(values)
        return parsed
    except ValidationError as error:
        details = error.errors(include_url=False)
    invalid: set[str] = set()
    reported: set[tuple[str, ...]] = set()
    for detail in details:
        key = str(detail["loc"][0])
        invalid.add(key)
        if _is_about_other_type(detail, model, values):
            continue
        path, owner = _key_path(detail, model)
        if path in reported or (key not in parsed.spelled and key in values):
            continue  # an inherited value is a problem of the file it is from
        reported.add(path)
        written = _value_at(values, path)
        message, hint = _describe(detail, path[-1], written, owner, schema)
        spelled = ".".join((parsed.spelled.get(key, key), *path[1:]))
        parsed.problems.append(Problem(file, where + spelled, written, message, hint))
    remaining = {key: value for key, value in values.items() if key not in invalid}
    try:
        parsed.settings = model.model_validate(remaining)
    except ValidationError:
        parsed.settings = None  # a required key is invalid
    return parsed


def _key_path(
    detail: ErrorDetails, model: type[SettingsModel]
) -> tuple[tuple[str, ...], type[SettingsModel]]:
    """Return the key path of an error through nested objects, and the model of the last key."""
    first, *steps = [str(step) for step in detail["loc"]]
    path: tuple[str, ...] = (first,)
    while steps:
        annotation = model.model_fields[path[-1]].annotation
        inner = _model_within(annotation)
        if inner is None:
            break
        if _is_union(annotation) and steps.pop(0) != inner.__name__:
            break  # about another member of the union
        if not steps:
            break
        model, path = inner, (*path, steps.pop(0))
        if path[-1] not in inner.model_fields:
            break
    return path, model


def _is_about_other_type(detail: ErrorDetails, model: type[SettingsModel], values: Mapping[str, Any]) -> bool:
    """Return whether an error is about the text form of a value that is written as an object."""
    key = str(detail["loc"][0])
    field_info = model.model_fields.get(key)
    if field_info is None or not _is_union(field_info.annotation):
        return False
    inner = _model_within(field_info.annotation)
    is_object = isinstance(values.get(key), Mapping)
    return inner is not None and is_object and detail["loc"][1] != inner.__name__


def _is_union(annotation: Any) -> bool:
    """Return whether the type is a union of several types; pydantic's location then contains the type."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return len([member for member in members if member is not type(None)]) > 1


def _model_within(annotation: Any) -> type[SettingsModel] | None:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next(
        (member for member in members if isinstance(member, type) and issubclass(member, SettingsModel)), None
    )


def _value_at(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = values
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return NO_VALUE
        value = value[key]
    return value


def _classify_key(
    spelled: str,
    value: Any,
    values: dict[str, Any],
    parsed: ParsedSettings[M],
    model: type[M],
    schema: KeySchema,
    file: Path,
    where: str,
    elsewhere: Mapping[str, str],
) -> None:
    """Classify one written key: a setting, off, ignored, or a problem."""
    name = spelled.lstrip("-")
    key = schema.spellings.get(name, name)
    if (
        key == "validation_prompt_library"
        and isinstance(value, str)
        and _parse_plain(value) not in (True, False, None)
    ):
        key = "user_prompt_library"  # SimpleTuner accepts a path under both names; a boolean switches the bundled library

    def problem(message: str, hint: str) -> None:
        parsed.problems.append(Problem(file, where + spelled, value, message, hint))

    if key in parsed.spelled:
        if values.get(key) != value:
            problem(
                f"is the same setting as {parsed.spelled[key]}, with another value", "keep one of the two"
            )
        return
    if key in model.model_fields:
        parsed.spelled[key] = spelled
        values[key] = value
    elif key in schema.no_effect:
        if not _is_off(value, (False, 0)):
            parsed.warnings.append(
                f"{file.name}: {where}{spelled} = {json.dumps(value)} has no effect: {schema.no_effect[key]}"
            )
    elif key in schema.unsupported:
        unsupported = schema.unsupported[key]
        if not _is_off(value, unsupported.off):
            off = json.dumps(unsupported.off[0])
            problem("is not supported", unsupported.hint or f"write {off}, or remove the key")
    elif key in schema.inactive:
        pass  # its switch is off: any other value of the switch is reported itself
    elif schema.is_ignored(key):
        parsed.warnings.append(f"{file.name}: {where}{spelled} has no meaning here and is ignored")
    elif key in elsewhere:
        problem("is not a key of this file or object", f"write it in {elsewhere[key]}")
    else:
        known = [*model.model_fields, *schema.spellings]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        problem(
            "is not a known key", f"write {near[0]}" if near else "remove it; docs/settings.md lists the keys"
        )


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    value = _parse_plain(value)
    if isinstance(value, Mapping):  # {"enable": false, ...}
        value = _parse_plain(value.get("enable", True)) if value else None
    return value is None or value == [] or any(value == each for each in off)


def _parse_plain(value: Any) -> Any:
    """Convert a boolean, number or null written as a string to its value; return other values unchanged."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false", "none", "null", ""):
        return {"true": True, "false": False}.get(text)
    try:
        return float(text)
    except ValueError:
        return value


def _describe(
    detail: ErrorDetails, key: str, value: Any, model: type[M], schema: KeySchema
) -> tuple[str, str]:
    """Return what is wrong and what to write instead, from one of pydantic's errors."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.6)
        return (
            "is not a known key",
            f"write {near[0]}" if near else f"remove it; {', '.join(model.model_fields)} are known",
        )
    field_info = model.model_fields[key]
    description = f"{key}: {field_info.description}"
    choices = literal_values(field_info.annotation)
    if kind == "missing":
        return "is missing", f"add it. {description}"
    if isinstance(context.get("error"), BadValueError):
        return str(context["error"]), context["error"].hint
    if kind == "value_error":
        return str(context["error"]), description
    if choices and (kind == "literal_error" or kind.endswith("_type")):
        return _wrong_choice(key, detail["input"] if kind == "literal_error" else value, choices, schema)
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {limit:g}", f"write a value {words} {limit:g}. {description}"
    if kind == "finite_number":
        return "must be a finite number", description
    if kind == "int_from_float":
        return "must be a whole number", f"write {round(float(value))}. {description}"
    if kind == "string_pattern_mismatch":
        return "does not have the required form", description
    if kind in ("tuple_type", "list_type"):
        return "must be a list", f"write a list. {description}"
    if kind == "dict_type":
        return "must be an object", f"write an object. {description}"
    for prefix, words in _NUMBER_WORDS.items():
        if kind.startswith(prefix):
            return f"must be {words}", f"write {words}. {description}"
    if kind == "path_type":
        also = " or a list of texts" if "tuple_type" in _container_types(field_info.annotation) else ""
        return f"must be a path{also}", f"write a path as text{also}. {description}"
    if kind in ("model_type", "model_attributes_type"):
        inner = _model_within(field_info.annotation)
        listed = ", ".join(inner.model_fields) if inner else ""
        return "must be an object", f"write an object with any of {listed}. {description}"
    return detail["msg"], description


def _container_types(annotation: Any) -> set[str]:
    return {
        f"{get_origin(member).__name__}_type"
        for member in get_args(annotation)
        if get_origin(member) is tuple
    }


def _wrong_choice(key: str, value: Any, choices: tuple[str, ...], schema: KeySchema) -> tuple[str, str]:
    listed = ", ".join(json.dumps(choice) for choice in choices)
    if isinstance(value, str):
        if value in schema.unsupported_values.get(key, frozenset()):
            return f"{value} is not supported", f"write one of {listed}" if len(
                choices
            ) > 1 else f"write {listed}"
        near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.6)
        if near:
            return "is not one of the known values", f'write "{near[0]}" (known: {listed})'
    if key == "model_family":
        return "is another model family; this project trains Stable Diffusion XL", 'write "sdxl"'
    return "is not one of the known values", f"write one of {listed}" if len(
        choices
    ) > 1 else f"write {listed}"


def literal_values(annotation: Any) -> tuple[str, ...]:
    """Return the values of the first Literal in an annotation, within unions, tuples and Annotated; () without one."""
    origin = get_origin(annotation)
    if origin is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType, tuple):
        for member in get_args(annotation):
            if found := literal_values(member):
                return found
    return literal_values(annotation.__origin__) if hasattr(annotation, "__metadata__") else ()
