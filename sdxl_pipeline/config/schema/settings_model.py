"""The base of every settings model: conversion of written values to typed ones.

SimpleTuner's files often write numbers and booleans as strings ("true", "1e-4"), and "none", "null" or "" for "not set". Pydantic
converts the strings to numbers; this base defines which values mean not set, and rejects booleans for numbers.
"""

import json
import os
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from sdxl_pipeline.config.schema.key_facts import key_of

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]

_NOT_SET = {"", "none", "null"}
LARGEST: Final = 2**63
"""Numbers of at least this size are rejected: they overflow an int64."""

_LONGEST_NAME, _LONGEST_PATH = 255, 1024


class BadValueError(ValueError):
    """A value that is not allowed; `hint` is what to write instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class SettingsModel(BaseModel):
    """A frozen model that rejects unknown keys, NaN and infinity, and reads "none" as None for optional fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _normalize_value(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        kinds = _alternatives(field.annotation)
        if value is None and type(None) not in kinds:
            return field.get_default(call_default_factory=True)  # null selects the default
        if isinstance(value, str) and type(None) in kinds and value.strip().lower() in _NOT_SET:
            # for free text "none" is text
            return None if str not in kinds or not value.strip() else value
        if value is False and type(None) in kinds and not {bool, int, float} & set(kinds):
            return None  # SimpleTuner also writes false for "none"
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise BadValueError(
                "must be a number, not true or false",
                f"write a number. {info.field_name}: {field.description}",
            )
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise BadValueError(
                "is too large", f"write a smaller number. {info.field_name}: {field.description}"
            )
        if isinstance(value, str) and int in kinds and not {float, str} & set(kinds):
            return _parse_int(value)
        if isinstance(value, str) and (Path in kinds or key_of(field).path):
            require_path(value)
        return value


def require_path(text: str) -> None:
    """Raise BadValueError for text that cannot be a path of this machine."""
    if "\0" in text:
        raise BadValueError("contains a NUL character, which a path cannot", "write the path without it")
    try:
        encoded = os.fsencode(Path(text).expanduser())
    except RuntimeError as error:
        raise BadValueError(
            f"refers to the home folder of {text.split('/')[0]}, which does not exist on this machine",
            "write the absolute path, such as /home/user/data",
        ) from error
    except UnicodeEncodeError as error:
        raise BadValueError(
            "contains characters that a path cannot", "write the path as it is on disk"
        ) from error
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise BadValueError(
            f"is too long for a path: {len(encoded)} bytes, longest name {longest} bytes",
            f"write a path of at most {_LONGEST_PATH} bytes, each name at most {_LONGEST_NAME}",
        )


def _parse_int(text: str) -> int | str:
    """Convert text of a whole number in any notation, such as "1e4", to an int; return other text unchanged."""
    try:
        number = float(text)
    except ValueError:
        return text
    is_digits = text.strip().lstrip("+-").isdigit()  # int() is exact, a float may round
    return text if is_digits or not number.is_integer() or abs(number) >= LARGEST else int(number)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself, without Annotated wrappers."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__)
    return (annotation,)


def none_for_zero(value: Any) -> Any:
    """Return None for a 0 in any notation, which SimpleTuner writes for "off"; return other values unchanged."""
    try:
        return None if not isinstance(value, bool) and float(value) == 0 else value
    except (TypeError, ValueError, OverflowError):
        return value


def read_stages(value: Any) -> Any:
    """Return `skip_file_discovery` as text: "" for false, and comma-separated names for a list."""
    if isinstance(value, list) and all(isinstance(stage, str) for stage in value):
        return ",".join(value)
    return "" if value is False or (isinstance(value, str) and value.strip().lower() == "false") else value


def read_list(value: Any) -> Any:
    """Split text such as 'a,b' or '["a", "b"]' into its parts; return other values unchanged. Raise BadValueError for invalid JSON."""
    if not isinstance(value, str):
        return value
    if value.strip().startswith("["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadValueError(
                f"is not a list: {getattr(error, 'msg', error)}",
                'write a list such as ["to_k", "to_q"], or "to_k,to_q"',
            ) from error
    return tuple(part.strip() for part in value.split(",") if part.strip() not in ("", "none"))
