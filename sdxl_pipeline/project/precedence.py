"""Which of several places decides a setting: the launchpad, then `config.json`, then the hardware profile, then the default."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sdxl_pipeline.project.checks import check_training
from sdxl_pipeline.project.hardware import Hardware
from sdxl_pipeline.project.keys import read_settings
from sdxl_pipeline.project.known_keys import TRAINING
from sdxl_pipeline.project.problems import Problem, ProjectError
from sdxl_pipeline.project.training import PROFILE_KEYS, TrainingSettings

LAUNCHPAD: Final = Path("launchpad")
"""Stands for the file in problems with values given at the launch of a run."""

READ_WITH_THE_PROJECT: Final = frozenset(
    """data_backend_config resolution resolution_type minimum_image_size maximum_image_size target_downsample_size
    max_upscale_threshold aspect_bucket_rounding aspect_bucket_alignment caption_strategy instance_prompt prepend_instance_prompt
    only_instance_prompt skip_file_discovery write_batch_size output_dir logging_dir validation_prompt user_prompt_library
    validation_negative_prompt retraining_cron""".split()
)
"""Settings that have shaped the datasets, prompts or schedules before a run is launched, so that a run cannot change them."""

_LENGTH = ("max_train_steps", "num_train_epochs")


def resolve_settings(
    training: TrainingSettings, hardware: Hardware, overrides: Mapping[str, Any]
) -> tuple[TrainingSettings, dict[str, str]]:
    """The settings of one run, and where each value came from.

    `training` is what `config.json` says, `overrides` what the launchpad says, under any spelling that `config.json` allows. In the
    result no key of `PROFILE_KEYS` is None. Sources read "launchpad", "config.json", "hardware profile <name>" or "default". Raises
    ProjectError for overrides that are wrong, or that do not go together with the rest.
    """
    reading = read_settings(overrides, TrainingSettings, TRAINING, LAUNCHPAD)
    problems = list(reading.problems)
    for key in reading.spelled.keys() & READ_WITH_THE_PROJECT:
        message = "is read together with the project, before a run is launched"
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
    for settings, source in ((training, "config.json"), (reading.settings, "launchpad")):
        given = {key: getattr(settings, key) for key in settings.model_fields_set}
        if any(given.get(key) is not None for key in _LENGTH):
            for key in _LENGTH:  # whoever says how long to train decides it alone
                values.pop(key, None)
                sources[key] = "default"
        for key, value in given.items():
            if value is not None or key not in (*PROFILE_KEYS, *_LENGTH):
                values[key], sources[key] = value, source
    filled_in = {
        key: value for key, value in training.model_dump().items() if key not in training.model_fields_set
    }
    resolved = TrainingSettings.model_validate({**_without_length(filled_in), **values})

    problems = [
        Problem(LAUNCHPAD, finding.key, getattr(resolved, finding.key), finding.message, finding.remedy)
        for finding in check_training(resolved)
    ]
    if hardware.device == "cpu" and resolved.mixed_precision == "fp16":
        place = (
            LAUNCHPAD
            if sources["mixed_precision"] == "launchpad"
            else Path(training.data_backend_config).with_name("config.json")
        )
        message = "needs a GPU, and this machine's hardware profile is " + hardware.profile
        problems.append(Problem(place, "mixed_precision", "fp16", message, 'write "no" or "bf16"'))
    if problems:
        raise ProjectError(problems)
    return resolved, sources


def _without_length(values: dict[str, Any]) -> dict[str, Any]:
    """Values filled in by the project, such as absolute paths, without the default length, which follows from what is given."""
    return {key: value for key, value in values.items() if key not in (*_LENGTH, *PROFILE_KEYS)}
