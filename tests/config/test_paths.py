"""Every setting that may contain a path is marked, and all are resolved relative to the project's folder."""

from pathlib import Path
from types import UnionType
from typing import get_args

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.paths import LOCAL_PATH_KEYS, NAME_OR_PATH_KEYS, with_absolute_paths
from sdxl_pipeline.config.resolve import NOT_OVERRIDABLE_KEYS, resolve_settings
from sdxl_pipeline.config.schema.training import TrainingSettings

TEXTS = {
    "eval_dataset_id",
    "hub_model_id",
    "instance_prompt",
    "model_card_note",
    "released_checkpoint",
    "retraining_cron",
    "revision",
    "skip_file_discovery",
    "tracker_project_name",
    "tracker_run_name",
    "validation_negative_prompt",
    "validation_prompt",
    "validation_resolution",
}
"""Free-text settings that contain no path."""


LAUNCHED = {*LOCAL_PATH_KEYS, *NAME_OR_PATH_KEYS} - {*NOT_OVERRIDABLE_KEYS, "lycoris_config"}


def test_every_free_text_setting_is_a_path_or_listed_as_text():
    kinds = {key: field.annotation for key, field in TrainingSettings.model_fields.items()}
    free = {
        key
        for key, kind in kinds.items()
        if kind is str or (isinstance(kind, UnionType) and str in get_args(kind))
    }
    assert free == {*LOCAL_PATH_KEYS, *NAME_OR_PATH_KEYS, *TEXTS}
    assert not TEXTS & {*LOCAL_PATH_KEYS, *NAME_OR_PATH_KEYS}


def test_with_absolute_paths_resolves_paths_and_preserves_names(tmp_path: Path):
    (tmp_path / "taesd").mkdir()
    (tmp_path / "start.safetensors").touch()
    written = {
        "webhook_config": "hooks.json",
        "output_dir": "/elsewhere",
        "resume_from_checkpoint": "step-1",
        "validation_preview_model_name_or_path": "taesd",
        "init_lora": "start.safetensors",
        "pretrained_evaluation_model_name_or_path": "owner/clip",
        "pretrained_model_name_or_path": "taesd",
    }
    settings = with_absolute_paths(TrainingSettings.model_validate(written), tmp_path)
    assert {key: getattr(settings, key) for key in written} == {
        **written,
        **{
            key: str(tmp_path / written[key])
            for key in (
                "webhook_config",
                "resume_from_checkpoint",
                "validation_preview_model_name_or_path",
                "init_lora",
            )
        },
    }
    assert settings.logging_dir == str(tmp_path / "logs")
    assert settings.model_fields_set == written.keys()
    assert with_absolute_paths(TrainingSettings(), tmp_path).resume_from_checkpoint == "latest"


@pytest.mark.parametrize("key", sorted(LAUNCHED))
def test_resolve_settings_resolves_paths_of_the_run_config(tmp_path: Path, key: str):
    (tmp_path / "it.safetensors").touch()
    settings, sources = resolve_settings(
        TrainingSettings(), PRESETS["cpu"], {key: "it.safetensors"}, tmp_path
    )
    assert (getattr(settings, key), sources[key]) == (str(tmp_path / "it.safetensors"), "launchpad")
