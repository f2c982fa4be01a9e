"""For any JSON in the two files, load_project returns a project or raises ProjectError, and never another exception."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sdxl_pipeline.config.hardware_profiles import PRESETS
from sdxl_pipeline.config.loader import InvalidProject, Project, discover_projects, load_project
from sdxl_pipeline.config.problems import ProjectError
from sdxl_pipeline.config.resolve import resolve_settings
from sdxl_pipeline.config.schema.datasets import ImageDataset, TextEmbedsDataset
from sdxl_pipeline.config.schema.settings_model import SettingsModel
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.simpletuner_schema import IMAGES, TEXT_EMBEDS, TRAINING, KeySchema
from tests.config.conftest import IMAGE_ENTRY

BUG = "a bug in this program"

SCALARS = [
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    -0.0,
    1e308,
    10**400,
    2**63,
    "",
    " ",
    "x",
    "猫",
    "\0",
    "none",
    "true",
    "1e4",
    "1e999",
]
SCALARS += [
    "9" * 5000,
    "a" * 5000,
    "/".join(["ab"] * 3000),
    "~nouser/x",
    "~",
    "/root/x/y",
    "[",
    "[1,2",
    "{",
    "nan",
    "a=b,c",
    "a/b/c",
]
SCALARS += ["1x1", "9999999x9999999", "s3://", "http://u:p@h", "latest", "lora", "adamw"]


def random_value(rng: random.Random, depth: int = 0) -> Any:
    """A JSON value of any shape."""
    kind = rng.random()
    if depth > 3 or kind < 0.7:
        return rng.choice(SCALARS)
    size = rng.randrange(3)
    if kind < 0.85:
        return [random_value(rng, depth + 1) for _ in range(size)]
    names = ["", "a", "enable", "path", "weight", "aspect", "algo", "apply_preset", "count"]
    return {rng.choice(names): random_value(rng, depth + 1) for _ in range(size)}


def keys_of(model: type[SettingsModel], schema: KeySchema) -> list[str]:
    """Every key that an object may hold."""
    return [*model.model_fields, *schema.spellings, *schema.unsupported, *schema.inactive]


def require_problems(folder: Path, written: object) -> None:
    """Fail unless the project loads and resolves, or has expected problems that can be printed."""
    text = ""
    try:
        project = load_project(folder)
        resolve_settings(project.training, PRESETS["cpu"], {}, project.folder)
    except ProjectError as error:
        text = str(error)
    assert BUG not in text, (written, text)
    text.encode()


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("config", keys_of(TrainingSettings, TRAINING)),
        ("images", keys_of(ImageDataset, IMAGES)),
        ("text_embeds", keys_of(TextEmbedsDataset, TEXT_EMBEDS)),
    ],
)
def test_load_project_any_value_of_any_key_reports_problems_by_key(
    write_project: Callable[..., Path], section: str, keys: list[str]
) -> None:
    rng = random.Random(section)
    for key in keys:
        for _ in range(2):
            entry = {key: random_value(rng)}
            config = entry if section == "config" else {}
            images = IMAGE_ENTRY | entry if section == "images" else IMAGE_ENTRY
            texts = {"id": "texts", "dataset_type": "text_embeds"} | (
                entry if section == "text_embeds" else {}
            )
            require_problems(write_project(config, [images, texts]), entry)


def test_load_project_random_json_reports_problems_by_key(write_project: Callable[..., Path]) -> None:
    rng = random.Random(1)

    def some(keys: list[str]) -> dict[str, Any]:
        return {key: random_value(rng) for key in rng.sample(keys, 12)}

    for _ in range(30):
        config = some(keys_of(TrainingSettings, TRAINING))
        datasets = [some(keys_of(ImageDataset, IMAGES)) for _ in range(3)]
        require_problems(write_project(config, datasets), (config, datasets))
        require_problems(write_project(json.dumps(random_value(rng)), json.dumps(random_value(rng))), "files")


@pytest.mark.parametrize("whole", ['{\n  "seed": 1,\n  "optimizer": "adamw"\n}\n', '[\n{"id": "a"\n}\n]'])
def test_load_project_truncated_file_reports_a_problem(
    write_project: Callable[..., Path], whole: str
) -> None:
    for length in range(1, len(whole)):
        require_problems(write_project(whole[:length], None), whole[:length])
        require_problems(write_project({}, whole[:length]), whole[:length])


@pytest.mark.parametrize(
    "config",
    [
        "{\n",
        '{"\\ud800": 1}',
        '{"seed": ' + "9" * 5000 + "}",
        {"output_dir": "~nouser/x"},
        {"init_lora": "a" * 300},
        {"lora_type": "lycoris", "lycoris_config": "a" * 300},
        {"webhook_config": "a\0b"},
        {"retraining_cron": "99 * * * *"},
        {"disk_low_threshold": "9" * 400 + "G"},
        {"max_train_steps": 10**400},
    ],
)
def test_discover_projects_invalid_project_does_not_affect_others(
    write_project: Callable[..., Path], config: Any
) -> None:
    write_project(config, name="broken")
    folder = write_project({}, name="valid")
    invalid, valid = discover_projects(folder.parent)
    assert isinstance(valid, Project)
    assert isinstance(invalid, InvalidProject)
    (problem,) = invalid.error.problems
    assert problem.file == folder.parent / "broken" / "config.json"
    assert BUG not in problem.message


def test_load_project_unexpected_exception_becomes_a_problem_with_its_location(
    write_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise IndexError("list index out of range")

    monkeypatch.setattr("sdxl_pipeline.config.loader.parse_datasets", fail)
    with pytest.raises(ProjectError) as caught:
        load_project(write_project())
    (problem,) = caught.value.problems
    assert BUG in problem.message
    assert "IndexError: list index out of range (test_any_json.py, line " in problem.message


def test_load_project_circular_links_are_reported_as_problems(write_project: Callable[..., Path]) -> None:
    folder = write_project({"init_lora": "circle"})
    (folder / "data").symlink_to(folder / "data")
    (folder / "circle").symlink_to(folder / "circle")
    require_problems(folder, "circle")
