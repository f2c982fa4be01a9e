"""Precedence of settings: run config (launchpad), then `config.json`, then the hardware profile, then the default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.paths import with_absolute_paths
from sdxl_pipeline.config.problems import NO_VALUE, Problem, ProjectError, as_project_errors
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import LENGTH_KEYS, PROFILE_KEYS, TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import TRAINING
from sdxl_pipeline.config.validators.settings_rules import check_training

RUN_CONFIG: Final = Path("launchpad")
"""Represents the file in problems with the values of a run config."""

NOT_OVERRIDABLE_KEYS: Final = keys_with(TrainingSettings, lambda key: not key.overridable)
"""Keys that a run config cannot set: the base model, datasets, prompts, schedules or other assets read them before the run starts."""


def resolve_settings(
    training: TrainingSettings,
    hardware: Hardware,
    overrides: Mapping[str, Any],
    folder: Path = Path(),
) -> tuple[TrainingSettings, dict[str, str]]:
    """Return the settings of one run, and the source of each value.

    `training` has the values of `config.json`, `overrides` those of the run config, under any alias that `config.json` allows; its
    relative paths are relative to the project's `folder`. In the result no key of `PROFILE_KEYS` is None. Sources are "launchpad",
    "config.json", "hardware profile <name>" or "default". Raise ProjectError for invalid overrides, or invalid combinations with other
    settings; each problem contains the source of its value.
    """
    with as_project_errors(folder):
        return _resolve(training, hardware, overrides, folder)


def _resolve(
    training: TrainingSettings, hardware: Hardware, overrides: Mapping[str, Any], folder: Path
) -> tuple[TrainingSettings, dict[str, str]]:
    parsed = parse_settings(overrides, TrainingSettings, TRAINING, RUN_CONFIG)
    problems = list(parsed.problems)
    for key in filter(parsed.spelled.get, NOT_OVERRIDABLE_KEYS):
        message = "is read before a training starts, or by other assets"
        problems.append(
            Problem(
                RUN_CONFIG,
                parsed.spelled[key],
                overrides[parsed.spelled[key]],
                message,
                "write it in config.json",
            )
        )
    if problems or parsed.settings is None:
        raise ProjectError(problems)

    values: dict[str, Any] = {}
    sources = dict.fromkeys(TrainingSettings.model_fields, "default")
    for key in PROFILE_KEYS:
        values[key], sources[key] = getattr(hardware, key), f"hardware profile {hardware.profile}"
    run_config = with_absolute_paths(parsed.settings, folder)
    for settings, source in ((training, "config.json"), (run_config, "launchpad")):
        given = {key: getattr(settings, key) for key in settings.model_fields_set}
        if any(given.get(key) is not None for key in LENGTH_KEYS):
            for key in LENGTH_KEYS:  # the source that sets the length replaces all its keys
                values.pop(key, None)
                sources[key] = "default"
        for key, value in given.items():
            if value is not None or key not in (*PROFILE_KEYS, *LENGTH_KEYS):
                values[key], sources[key] = value, source
    completed = {
        key: value for key, value in training.model_dump().items() if key not in training.model_fields_set
    }
    try:
        resolved = TrainingSettings.model_validate({**_without_length_and_profile(completed), **values})
    except (
        ValidationError
    ) as error:  # files and run config were validated before, so a value of the profile is invalid
        raise ProjectError(_profile_problems(error, hardware, {}, {}, folder)) from error
    written = any(source == "launchpad" for source in sources.values())
    for finding in check_training(resolved):
        # a default conflicts with a written value: one of the run config if there is any
        source = sources[finding.key]
        source = source if source != "default" else "launchpad" if written else "config.json"
        value = getattr(resolved, finding.key)
        problems.append(
            Problem(_source_file(source, folder), finding.key, value, finding.message, finding.hint)
        )
    if problems:
        raise ProjectError(problems)
    resolve_hardware(resolved, hardware, sources, folder)
    return resolved, sources


def resolve_hardware(
    settings: TrainingSettings,
    hardware: Hardware,
    sources: Mapping[str, str] | None = None,
    folder: Path = Path(),
) -> Hardware:
    """Return the hardware profile with the values of `PROFILE_KEYS` in `settings`.

    Raise ProjectError if the machine does not support them; `sources` of `resolve_settings` has the source of each value.
    """
    given = {key: getattr(settings, key) for key in PROFILE_KEYS if getattr(settings, key) is not None}
    try:
        return Hardware.model_validate(hardware.model_dump() | given)
    except ValidationError as error:
        raise ProjectError(_profile_problems(error, hardware, given, sources or {}, folder)) from error


def _profile_problems(
    error: ValidationError,
    hardware: Hardware,
    given: Mapping[str, Any],
    sources: Mapping[str, str],
    folder: Path,
) -> list[Problem]:
    problems = []
    for detail in error.errors(include_url=False):
        message = detail["msg"].removeprefix("Value error, ")
        # the error of an invalid combination has no field; its message begins with the key to change
        key = ".".join(str(part) for part in detail["loc"]) or message.split()[0]
        value = given.get(key, detail["input"] if detail["loc"] else NO_VALUE)
        source = sources.get(key, f"hardware profile {hardware.profile}")
        hint = "change it, or choose another profile with SDXL_HARDWARE"
        problems.append(
            Problem(_source_file(source, folder), key, value, message.removeprefix(f"{key} "), hint)
        )
    return problems


def _source_file(source: str, folder: Path) -> Path:
    """Return the path that represents a source in problems."""
    return folder / source if source == "config.json" else Path(source)


def _without_length_and_profile(values: dict[str, Any]) -> dict[str, Any]:
    """Return values completed at project load, such as absolute paths, without length and profile keys, which other sources set."""
    return {key: value for key, value in values.items() if key not in (*LENGTH_KEYS, *PROFILE_KEYS)}
