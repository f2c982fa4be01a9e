"""An object of a user's file read into a settings model: spellings, unknown keys, and pydantic's errors put into the user's terms."""

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
    """What an object holds: the settings (None if a required key is missing or wrong), and how each key was spelled."""

    settings: M | None
    spelled: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse_settings(
    raw: Mapping[str, Any],
    model: type[M],
    vocabulary: KeySchema,
    file: Path,
    where: str = "",
    inherited: Mapping[str, Any] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> ParsedSettings[M]:
    """Read one object into `model`.

    `where` stands before each key in problems. `inherited` gives values for keys that the object leaves out. `elsewhere` says of keys
    that belong to another place which one. Where some keys are wrong, the settings are those of the remaining ones, so that the
    checks that follow can still say what else is wrong; then `problems` is not empty.
    """
    reading: ParsedSettings[M] = ParsedSettings(None)
    values: dict[str, Any] = {}
    for spelled, value in raw.items():
        _sort_in(spelled, value, values, reading, model, vocabulary, file, where, elsewhere or {})
    for key, value in (inherited or {}).items():
        if value is not None:
            values.setdefault(key, value)
    try:
        reading.settings = model.model_validate(values)
        return reading
    except ValidationError as error:
        details = error.errors(include_url=False)
    bad: set[str] = set()
    told: set[tuple[str, ...]] = set()
    for detail in details:
        key = str(detail["loc"][0])
        bad.add(key)
        if _is_about_another_form(detail, model, values):
            continue
        path, owner = _place_of(detail, model)
        if path in told or (key not in reading.spelled and key in values):
            continue  # the latter is inherited, and a problem of the file it comes from
        told.add(path)
        shown = _written_at(values, path)
        message, hint = _in_words(detail, path[-1], shown, owner, vocabulary)
        spelled = ".".join((reading.spelled.get(key, key), *path[1:]))
        reading.problems.append(Problem(file, where + spelled, shown, message, hint))
    remaining = {key: value for key, value in values.items() if key not in bad}
    try:
        reading.settings = model.model_validate(remaining)
    except ValidationError:
        reading.settings = None  # a required key is among the bad ones
    return reading


def _place_of(
    detail: ErrorDetails, model: type[SettingsModel]
) -> tuple[tuple[str, ...], type[SettingsModel]]:
    """The keys that lead to what an error is about, through objects within objects, and the model that has the last of them."""
    first, *steps = [str(step) for step in detail["loc"]]
    path: tuple[str, ...] = (first,)
    while steps:
        annotation = model.model_fields[path[-1]].annotation
        inner = _model_within(annotation)
        if inner is None:
            break
        if _is_one_of_several(annotation) and steps.pop(0) != inner.__name__:
            break  # about another form that the value may have
        if not steps:
            break
        model, path = inner, (*path, steps.pop(0))
        if path[-1] not in inner.model_fields:
            break
    return path, model


def _is_about_another_form(
    detail: ErrorDetails, model: type[SettingsModel], values: Mapping[str, Any]
) -> bool:
    """Whether an error says that an object is no text, where both may be written."""
    key = str(detail["loc"][0])
    field_info = model.model_fields.get(key)
    if field_info is None or not _is_one_of_several(field_info.annotation):
        return False
    inner = _model_within(field_info.annotation)
    is_object = isinstance(values.get(key), Mapping)
    return inner is not None and is_object and detail["loc"][1] != inner.__name__


def _is_one_of_several(annotation: Any) -> bool:
    """Whether a value may have several forms; pydantic then names the form before the place within it."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else ()
    return len([member for member in members if member is not type(None)]) > 1


def _model_within(annotation: Any) -> type[SettingsModel] | None:
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next(
        (member for member in members if isinstance(member, type) and issubclass(member, SettingsModel)), None
    )


def _written_at(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = values
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return NO_VALUE
        value = value[key]
    return value


def _sort_in(
    spelled: str,
    value: Any,
    values: dict[str, Any],
    reading: ParsedSettings[M],
    model: type[M],
    vocabulary: KeySchema,
    file: Path,
    where: str,
    elsewhere: Mapping[str, str],
) -> None:
    """Decide what one written key is: a setting, off, without meaning, or a problem."""
    name = spelled.lstrip("-")
    key = vocabulary.spellings.get(name, name)
    if (
        key == "validation_prompt_library"
        and isinstance(value, str)
        and _plain(value) not in (True, False, None)
    ):
        key = "user_prompt_library"  # both names are in use for a path; the reference's own library is switched by a boolean

    def problem(message: str, hint: str) -> None:
        reading.problems.append(Problem(file, where + spelled, value, message, hint))

    if key in reading.spelled:
        if values.get(key) != value:
            problem(
                f"is the same setting as {reading.spelled[key]}, with another value", "keep one of the two"
            )
        return
    if key in model.model_fields:
        reading.spelled[key] = spelled
        values[key] = value
    elif key in vocabulary.instead:
        if not _is_off(value, (False, 0)):
            reading.warnings.append(
                f"{file.name}: {where}{spelled} = {json.dumps(value)} has no effect: {vocabulary.instead[key]}"
            )
    elif key in vocabulary.later:
        later = vocabulary.later[key]
        if not _is_off(value, later.off):
            off = json.dumps(later.off[0])
            problem("is not available yet", later.hint or f"write {off}, or leave the key out")
    elif key in vocabulary.idle:
        pass  # its switch is off: any other value of the switch is a problem of its own
    elif vocabulary.is_meaningless(key):
        reading.warnings.append(f"{file.name}: {where}{spelled} has no meaning here and is not read")
    elif key in elsewhere:
        problem("is not a key of this place", f"write it in {elsewhere[key]}")
    else:
        known = [*model.model_fields, *vocabulary.spellings]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
        problem(
            "is not a known key", f"write {near[0]}" if near else "remove it; docs/settings.md lists the keys"
        )


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    value = _plain(value)
    if isinstance(value, Mapping):  # {"enable": false, ...}
        value = _plain(value.get("enable", True)) if value else None
    return value is None or value == [] or any(value == each for each in off)


def _plain(value: Any) -> Any:
    """A boolean, number or null that was written as a string, as what it stands for."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if text in ("true", "false", "none", "null", ""):
        return {"true": True, "false": False}.get(text)
    try:
        return float(text)
    except ValueError:
        return value


def _in_words(
    detail: ErrorDetails, key: str, value: Any, model: type[M], vocabulary: KeySchema
) -> tuple[str, str]:
    """What is wrong and what to write instead, from one of pydantic's errors."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, model.model_fields, n=1, cutoff=0.6)
        return (
            "is not a known key",
            f"write {near[0]}" if near else f"remove it; {', '.join(model.model_fields)} are known",
        )
    field_info = model.model_fields[key]
    meaning = f"{key}: {field_info.description}"
    choices = literal_values(field_info.annotation)
    if kind == "missing":
        return "is missing", f"add it. {meaning}"
    if isinstance(context.get("error"), BadValueError):
        return str(context["error"]), context["error"].hint
    if kind == "value_error":
        return str(context["error"]), meaning
    if choices and (kind == "literal_error" or kind.endswith("_type")):
        return _wrong_choice(key, detail["input"] if kind == "literal_error" else value, choices, vocabulary)
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {limit:g}", f"write a value {words} {limit:g}. {meaning}"
    if kind == "finite_number":
        return "must be a finite number", meaning
    if kind == "int_from_float":
        return "must be a whole number", f"write {round(float(value))}. {meaning}"
    if kind == "string_pattern_mismatch":
        return "is not of the form that is asked for", meaning
    if kind in ("tuple_type", "list_type"):
        return "must be a list", f"write a list. {meaning}"
    if kind == "dict_type":
        return "must be an object", f"write an object. {meaning}"
    for prefix, words in _NUMBER_WORDS.items():
        if kind.startswith(prefix):
            return f"must be {words}", f"write {words}. {meaning}"
    if kind == "path_type":
        also = " or a list of texts" if "tuple_type" in _kinds_of(field_info.annotation) else ""
        return f"must be a path{also}", f"write a path as text{also}. {meaning}"
    if kind in ("model_type", "model_attributes_type"):
        inner = _model_within(field_info.annotation)
        listed = ", ".join(inner.model_fields) if inner else ""
        return "must be an object", f"write an object with any of {listed}. {meaning}"
    return detail["msg"], meaning


def _kinds_of(annotation: Any) -> set[str]:
    return {
        f"{get_origin(member).__name__}_type"
        for member in get_args(annotation)
        if get_origin(member) is tuple
    }


def _wrong_choice(key: str, value: Any, choices: tuple[str, ...], vocabulary: KeySchema) -> tuple[str, str]:
    listed = ", ".join(json.dumps(choice) for choice in choices)
    if isinstance(value, str):
        if value in vocabulary.later_values.get(key, frozenset()):
            return f"{value} is not available yet", f"write one of {listed}" if len(
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
    """The values of the first Literal in an annotation, looking through unions, tuples and Annotated; () without one."""
    origin = get_origin(annotation)
    if origin is Literal:
        return tuple(str(value) for value in get_args(annotation))
    if origin in (Union, UnionType, tuple):
        for member in get_args(annotation):
            if found := literal_values(member):
                return found
    return literal_values(annotation.__origin__) if hasattr(annotation, "__metadata__") else ()
