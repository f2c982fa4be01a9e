"""Which of several places decides a setting: the launchpad, then `config.json`, then the hardware profile, then the default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.paths import with_absolute_paths
from sdxl_pipeline.config.problems import NO_VALUE, Problem, ProjectError, only_project_errors
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.training import LENGTH_KEYS, PROFILE_KEYS, TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import TRAINING
from sdxl_pipeline.config.validators.settings_rules import check_training

LAUNCHPAD: Final = Path("launchpad")
"""Stands for the file in problems with values given at the launch of a run."""

READ_WITH_THE_PROJECT: Final = keys_with(TrainingSettings, lambda key: not key.overridable)
"""Keys that a run config cannot set: the base model, datasets, prompts, schedules or other assets read them before the run starts."""


def resolve_settings(
    training: TrainingSettings,
    hardware: Hardware,
    overrides: Mapping[str, Any],
    folder: Path = Path(),
) -> tuple[TrainingSettings, dict[str, str]]:
    """The settings of one run, and where each value came from.

    `training` is what `config.json` says, `overrides` what the launchpad says, under any spelling that `config.json` allows; its
    relative paths are seen from `folder`, the project's. In the result no key of `PROFILE_KEYS` is None. Sources read "launchpad",
    "config.json", "hardware profile <name>" or "default". Raises ProjectError for overrides that are wrong, or that do not go together
    with the rest; each problem names the place its value is from.
    """
    with only_project_errors(folder):
        return _resolve(training, hardware, overrides, folder)


def _resolve(
    training: TrainingSettings, hardware: Hardware, overrides: Mapping[str, Any], folder: Path
) -> tuple[TrainingSettings, dict[str, str]]:
    reading = parse_settings(overrides, TrainingSettings, TRAINING, LAUNCHPAD)
    problems = list(reading.problems)
    for key in filter(reading.spelled.get, READ_WITH_THE_PROJECT):
        message = "is read before a training is launched, or by other assets"
        problems.append(
            Problem(
                LAUNCHPAD,
                reading.spelled[key],
                overrides[reading.spelled[key]],
                message,
                "write it in config.json",
            )
        )
    if problems or reading.settings is None:
        raise ProjectError(problems)

    values: dict[str, Any] = {}
    sources = dict.fromkeys(TrainingSettings.model_fields, "default")
    for key in PROFILE_KEYS:
        values[key], sources[key] = getattr(hardware, key), f"hardware profile {hardware.profile}"
    launched = with_absolute_paths(reading.settings, folder)
    for settings, source in ((training, "config.json"), (launched, "launchpad")):
        given = {key: getattr(settings, key) for key in settings.model_fields_set}
        if any(given.get(key) is not None for key in LENGTH_KEYS):
            for key in LENGTH_KEYS:  # whoever says how long to train decides it alone
                values.pop(key, None)
                sources[key] = "default"
        for key, value in given.items():
            if value is not None or key not in (*PROFILE_KEYS, *LENGTH_KEYS):
                values[key], sources[key] = value, source
    filled_in = {
        key: value for key, value in training.model_dump().items() if key not in training.model_fields_set
    }
    try:
        resolved = TrainingSettings.model_validate({**_without_length(filled_in), **values})
    except (
        ValidationError
    ) as error:  # the files and the launchpad are valid by themselves: it is the profile's value
        raise ProjectError(_profile_problems(error, hardware, {}, {}, folder)) from error
    written = any(source == "launchpad" for source in sources.values())
    for finding in check_training(resolved):
        # a default conflicts with a written value: the launchpad's where there is one
        source = sources[finding.key]
        source = source if source != "default" else "launchpad" if written else "config.json"
        value = getattr(resolved, finding.key)
        problems.append(Problem(_place(source, folder), finding.key, value, finding.message, finding.hint))
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
    """Return the hardware profile with what `settings` say of `PROFILE_KEYS`.

    Raises ProjectError if the machine cannot do that; `sources`, of `resolve_settings`, tell which place each value is from.
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
        # a combination that cannot be had is an error of no field, whose message begins with the key to change
        key = ".".join(str(part) for part in detail["loc"]) or message.split()[0]
        value = given.get(key, detail["input"] if detail["loc"] else NO_VALUE)
        source = sources.get(key, f"hardware profile {hardware.profile}")
        hint = "change it, or choose another profile with SDXL_HARDWARE"
        problems.append(Problem(_place(source, folder), key, value, message.removeprefix(f"{key} "), hint))
    return problems


def _place(source: str, folder: Path) -> Path:
    """Return the file that values of a source are from, or what stands for it in problems."""
    return folder / source if source == "config.json" else Path(source)


def _without_length(values: dict[str, Any]) -> dict[str, Any]:
    """Values filled in by the project, such as absolute paths, without the default length, which follows from what is given."""
    return {key: value for key, value in values.items() if key not in (*LENGTH_KEYS, *PROFILE_KEYS)}
