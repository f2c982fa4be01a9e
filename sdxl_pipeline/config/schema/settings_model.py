"""The base of every settings model: how written values become typed ones.

Files of this family of trainers write numbers and booleans as strings as often as not ("true", "1e-4"), and "none", "null" or ""
for "not set". Pydantic turns the strings into numbers; this base says what counts as not set, and keeps booleans out of numbers.
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
"""Numbers from here on are refused, whatever they count: they would overflow somewhere."""

_LONGEST_NAME, _LONGEST_PATH = 255, 1024


class BadValueError(ValueError):
    """A value that cannot be used, and what to write instead."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class SettingsModel(BaseModel):
    """A frozen model that refuses unknown keys, NaN and infinity, and reads "none" as not set where a field may be not set."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _read_written_value(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        kinds = _alternatives(field.annotation)
        if value is None and type(None) not in kinds:
            return field.get_default(call_default_factory=True)  # a null asks for the default
        if isinstance(value, str) and type(None) in kinds and value.strip().lower() in _NOT_SET:
            # "none" may be meant as text where free text is asked for
            return None if str not in kinds or not value.strip() else value
        if value is False and type(None) in kinds and not {bool, int, float} & set(kinds):
            return None  # these files write false for "none" as well
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise BadValueError(
                "must be a number, not true or false",
                f"write a number. {info.field_name}: {field.description}",
            )
        if isinstance(value, int) and abs(value) >= LARGEST:
            raise BadValueError(
                "is too large a number", f"write a smaller one. {info.field_name}: {field.description}"
            )
        if isinstance(value, str) and int in kinds and not {float, str} & set(kinds):
            return _whole_number(value)
        if isinstance(value, str) and (Path in kinds or key_of(field).path):
            require_path(value)
        return value


def require_path(text: str) -> None:
    """Raise BadValueError for text that no file or folder of this machine can be named by."""
    if "\0" in text:
        raise BadValueError("holds a NUL character, which no path can", "write the path without it")
    try:
        encoded = os.fsencode(Path(text).expanduser())
    except RuntimeError as error:
        raise BadValueError(
            f"names the home folder of {text.split('/')[0]}, which this machine does not have",
            "write the whole path, such as /home/user/data",
        ) from error
    except UnicodeEncodeError as error:
        raise BadValueError("holds characters that no path can", "write the path as it is on disk") from error
    longest = max(len(part) for part in encoded.split(b"/"))
    if longest > _LONGEST_NAME or len(encoded) > _LONGEST_PATH:
        raise BadValueError(
            f"is too long for a path: {len(encoded)} bytes, the longest name {longest}",
            f"write a path of at most {_LONGEST_PATH} bytes, each name at most {_LONGEST_NAME}",
        )


def _whole_number(text: str) -> int | str:
    """A whole number in any spelling of a number, such as "1e4", as an int; other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    is_digits = text.strip().lstrip("+-").isdigit()  # which an int holds exactly, and a float may not
    return text if is_digits or not number.is_integer() or abs(number) >= LARGEST else int(number)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type itself; Annotated is looked through."""
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))
    if hasattr(annotation, "__metadata__"):
        return _alternatives(annotation.__origin__)
    return (annotation,)


def none_for_zero(value: Any) -> Any:
    """The value, or None for a 0 in whatever spelling: these files write 0 for "off"."""
    try:
        return None if not isinstance(value, bool) and float(value) == 0 else value
    except (TypeError, ValueError, OverflowError):
        return value


def read_stages(value: Any) -> Any:
    """Return `skip_file_discovery` as text: false and a list are other spellings of "" and of names joined by commas."""
    if isinstance(value, list) and all(isinstance(stage, str) for stage in value):
        return ",".join(value)
    return "" if value is False or (isinstance(value, str) and value.strip().lower() == "false") else value


def read_list(value: Any) -> Any:
    """Text such as 'a,b' or '["a", "b"]' as its parts; anything else as it is. Raises BadValueError for a broken list."""
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
