"""Loader of projects: one folder per LoRA. Reads both of its files and reports all of their problems at once."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from sdxl_pipeline.config.dataset_parser import parse_datasets
from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.linked_files import read_webhooks, with_lycoris_file
from sdxl_pipeline.config.paths import (
    check_init_lora,
    check_resume_from,
    exists,
    resolve_path,
    with_absolute_paths,
)
from sdxl_pipeline.config.problems import NO_VALUE, Problem, ProjectError, as_project_errors
from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.datasets import CacheMode, ImageDataset, TextEmbedsDataset, asset_name
from sdxl_pipeline.config.schema.settings_model import SettingsModel
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.config.settings_parser import parse_settings
from sdxl_pipeline.config.simpletuner_schema import TRAINING
from sdxl_pipeline.config.validators.settings_rules import check_training, unused_training_settings

CONFIG_FILE: Final = "config.json"
DATASETS_FILE: Final = "multidatabackend.json"
PROJECTS_VARIABLE: Final = "SDXL_PIPELINE_PROJECTS"
DEFAULT_ROOT: Final = Path(__file__).resolve().parents[2] / "projects"
PROMPT_LIBRARY: Final = Path(__file__).with_name("prompt_library.json")

_EXPECTED_CONFIG = "an object of training settings"
_DATASET_KEYS = dict.fromkeys(ImageDataset.model_fields, f"the dataset's entry in {DATASETS_FILE}")


class Prompt(NamedTuple):
    """One validation prompt; `name` is short and unique within the project."""

    name: str
    prompt: str
    negative_prompt: str


@dataclass(frozen=True)
class Project:
    """A project with valid files.

    `name` is valid as an asset key and group; `folder` and all paths in the settings are absolute. `datasets` (of images), `mask_datasets`
    and `text_embeds` do not contain disabled entries. `warnings` are about settings without effect.
    """

    name: str
    folder: Path
    training: TrainingSettings
    datasets: tuple[ImageDataset, ...]
    text_embeds: tuple[TextEmbedsDataset, ...]
    prompts: tuple[Prompt, ...]
    warnings: tuple[str, ...]
    mask_datasets: tuple[ImageDataset, ...] = ()
    unused_settings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Warnings about the settings of a dataset, by its id."""

    @property
    def train_datasets(self) -> tuple[ImageDataset, ...]:
        """Return the training datasets."""
        return tuple(dataset for dataset in self.datasets if dataset.dataset_type == "image")

    @property
    def eval_datasets(self) -> tuple[ImageDataset, ...]:
        """Return the datasets that only the eval loss uses."""
        return tuple(dataset for dataset in self.datasets if dataset.dataset_type == "eval")

    def masks_of(self, dataset: ImageDataset) -> ImageDataset | None:
        """Return the masks of the images of `dataset`; None if it has none."""
        return next((entry for entry in self.mask_datasets if entry.id == dataset.conditioning_data), None)

    def text_embeds_of(self, dataset: ImageDataset) -> TextEmbedsDataset:
        """Return the text_embeds entry of `dataset`: the one it names, else the default one, else the first, else a new one."""
        by_id = {entry.id: entry for entry in self.text_embeds}
        if dataset.text_embeds is not None:
            return by_id[dataset.text_embeds]
        default = next((entry for entry in self.text_embeds if entry.default), None)
        return default or next(iter(self.text_embeds), TextEmbedsDataset(id="text-embeds", default=True))

    def text_cache_of(self, dataset: ImageDataset) -> CacheMode:
        """Return the cache mode of the captions of `dataset`: "disable" if the text encoders are trained, which would make it stale."""
        return "disable" if self.training.train_text_encoder else self.text_embeds_of(dataset).text_cache


@dataclass(frozen=True)
class InvalidProject:
    """A project whose files have problems; other projects are not affected."""

    name: str
    folder: Path
    error: ProjectError


def projects_folder(root: Path | None = None) -> Path:
    """Return `root`, else the folder in the environment variable SDXL_PIPELINE_PROJECTS, else `projects` beside the package; absolute."""
    if root is None:
        named = os.environ.get(PROJECTS_VARIABLE)
        root = Path(named).expanduser() if named else DEFAULT_ROOT
    return root.resolve()


def discover_projects(root: Path | None = None) -> list[Project | InvalidProject]:
    """Load every project folder in `root`, sorted by folder name; a project folder contains at least one of the two files.

    `root` defaults to the environment variable SDXL_PIPELINE_PROJECTS, else to `projects` beside the package.
    """
    root = projects_folder(root)
    if not root.is_dir():
        hint = f"create it, or set {PROJECTS_VARIABLE} to the folder of the project folders"
        return [
            _broken(asset_name(root.name) or "projects", root, "the projects folder does not exist", hint)
        ]
    try:
        folders = [folder for folder in sorted(root.iterdir()) if _is_project(folder)]
    except OSError as error:
        message = f"cannot be listed: {error.strerror or error}"
        return [_broken(asset_name(root.name) or "projects", root, message, "make it a readable folder")]
    found: list[Project | InvalidProject] = []
    used_names = {asset_name(folder.name) for folder in folders}
    owners: dict[str, Path] = {}
    for folder in folders:
        name = asset_name(folder.name)
        displayed = Path(os.fsencode(folder).decode(errors="backslashreplace"))
        if displayed != folder:
            message = "the folder's name is not UTF-8, so neither Dagster nor a manifest can store its path"
            found.append(_broken(name, displayed, message, "rename the folder"))
            continue
        if name in owners:
            message = f"its assets would be named {name}, like those of {owners[name].name}"
            hint = "rename one of the two folders: spaces, dashes and the like become _, and composed and decomposed accents are equal"
            number = next(n for n in range(2, len(folders) + 3) if f"{name}_{n}" not in used_names)
            found.append(_broken(f"{name}_{number}", folder, message, hint))
            used_names.add(f"{name}_{number}")
            continue
        owners[name] = folder
        try:
            found.append(load_project(folder))
        except ProjectError as error:
            found.append(InvalidProject(name, folder, error))
    return found


def _is_project(folder: Path) -> bool:
    files = (CONFIG_FILE, DATASETS_FILE)
    return not folder.name.startswith(".") and any(exists(folder / name) for name in files)


def load_project(folder: Path) -> Project:
    """Load the project in `folder`. Raise ProjectError with all problems of its files, and no other exception."""
    with as_project_errors(folder):
        return _load(folder.resolve())


def _load(folder: Path) -> Project:
    config_file = folder / CONFIG_FILE
    content, problems = read_json(config_file, _EXPECTED_CONFIG)
    if content is not None and not isinstance(content, Mapping):
        problems.append(
            Problem(config_file, "", NO_VALUE, "does not contain an object", f"write {_EXPECTED_CONFIG}")
        )
    raw: Mapping[str, Any] = content if isinstance(content, Mapping) else {}
    config = parse_settings(raw, TrainingSettings, TRAINING, config_file, elsewhere=_DATASET_KEYS)
    problems += config.problems
    training = config.settings
    if training is None:  # every key of config.json has a default, so the valid keys always parse
        raise AssertionError("TrainingSettings has a required key")
    warnings = [
        *config.warnings,
        *(f"{CONFIG_FILE}: {unused}" for unused in unused_training_settings(training)),
    ]
    training = _without_unused_adapter(training, warnings)
    training = with_lycoris_file(training, folder, problems, warnings)
    file_findings = (
        *check_init_lora(training.init_lora, folder),
        *check_resume_from(training.resume_from_checkpoint, folder),
    )
    reported = {problem.key.partition(".")[0] for problem in config.problems}
    for finding in (*check_training(training), *file_findings):
        spelled = config.spelled.get(finding.key, finding.key)
        if spelled in reported:
            continue  # its value is invalid and reported already
        displayed = getattr(training, finding.key)
        displayed = raw.get(spelled) if isinstance(displayed, SettingsModel) else displayed
        problems.append(Problem(config_file, spelled, displayed, finding.message, finding.hint))

    datasets_file = _find_datasets_file(training, folder, config_file, warnings)
    datasets = parse_datasets(datasets_file, folder, training, config_file)
    problems += datasets.problems
    warnings += datasets.warnings
    evaluated = [dataset.id for dataset in datasets.images if dataset.dataset_type == "eval"]
    if training.eval_dataset_id is not None and training.eval_dataset_id not in evaluated:
        hint = f"write one of {', '.join(evaluated)}" if evaluated else 'add one with "dataset_type": "eval"'
        spelled = config.spelled.get("eval_dataset_id", "eval_dataset_id")
        problems.append(
            Problem(config_file, spelled, training.eval_dataset_id, "is the id of no eval dataset", hint)
        )
    prompts = _read_prompts(training, folder, problems)
    if training.webhook_config is not None:
        problems += read_webhooks(resolve_path(folder, training.webhook_config))[1]
    if problems:
        raise ProjectError(problems)
    return Project(
        name=asset_name(folder.name),
        folder=folder,
        training=_with_project_values(training, folder, datasets_file),
        datasets=tuple(datasets.images),
        text_embeds=tuple(datasets.text_embeds),
        prompts=prompts,
        warnings=tuple(warnings),
        mask_datasets=tuple(datasets.masks),
        unused_settings=datasets.unused,
    )


def _without_unused_adapter(training: TrainingSettings, warnings: list[str]) -> TrainingSettings:
    """Return the settings of model_type full without adapter settings, with warnings. `init_lora` remains and fails validation."""
    if training.model_type != "full":
        return training
    written = training.model_fields_set & (AdapterSettings.model_fields.keys() - {"init_lora"})
    for key in sorted(written):
        warnings.append(
            f"{CONFIG_FILE}: {key} has no effect with model_type full, which trains the UNet itself and makes no adapter"
        )
    return TrainingSettings.model_validate(training.model_dump(include=training.model_fields_set - written))


def _find_datasets_file(
    training: TrainingSettings, folder: Path, config_file: Path, warnings: list[str]
) -> Path:
    """Return the file of data_backend_config; if it does not exist, the one of that name, or the default one, in the folder."""
    named = resolve_path(folder, training.data_backend_config)
    if exists(named):
        return named
    for other in (folder / named.name, folder / DATASETS_FILE):
        if exists(other):
            warnings.append(
                f"{config_file.name}: data_backend_config names {training.data_backend_config}, which does not exist; "
                f"{other.name} of the project folder is read instead"
            )
            return other
    return named


def _read_prompts(training: TrainingSettings, folder: Path, problems: list[Problem]) -> tuple[Prompt, ...]:
    """Return the validation prompt and those of the prompt libraries, in that order, with unique names."""
    negative = training.validation_negative_prompt
    prompts = (
        [Prompt("validation", training.validation_prompt, negative)] if training.validation_prompt else []
    )
    if training.validation_prompt_library:
        general = json.loads(PROMPT_LIBRARY.read_text(encoding="utf-8"))
        prompts += [Prompt(name, prompt, negative) for name, prompt in general.items()]
    if training.user_prompt_library is None:
        return tuple(prompts)
    path = resolve_path(folder, training.user_prompt_library)
    expected = '{"name": "prompt"} or {"name": {"prompt": "...", "negative_prompt": "..."}}'
    content, found = read_json(path, expected)
    problems += found
    if content is None:
        return tuple(prompts)
    if not isinstance(content, Mapping) or not content:
        problems.append(Problem(path, "", NO_VALUE, "contains no prompts by name", f"write {expected}"))
        return tuple(prompts)
    for name, entry in content.items():
        fields = {"prompt": entry} if isinstance(entry, str) else entry
        if not isinstance(fields, Mapping) or not all(
            isinstance(fields.get(key, ""), str) for key in ("prompt", "negative_prompt")
        ):
            problems.append(Problem(path, name, entry, "is not a prompt", f"write {expected}"))
            continue
        for key in fields.keys() - {"prompt", "negative_prompt"}:
            near = difflib.get_close_matches(key, ["prompt", "negative_prompt"], n=1)
            hint = f"write {near[0]}" if near else "remove it; prompt and negative_prompt are known"
            problems.append(Problem(path, f"{name}.{key}", fields[key], "is not a known key", hint))
        if not fields.get("prompt", "").strip():
            problems.append(Problem(path, name, entry, "has no prompt", f"write {expected}"))
            continue
        if any(prompt.name == name for prompt in prompts):
            problems.append(
                Problem(
                    path, name, entry, "is also the name of another validation prompt", "give it another name"
                )
            )
            continue
        prompts.append(Prompt(name, fields["prompt"], fields.get("negative_prompt", negative)))
    return tuple(prompts)


def _with_project_values(training: TrainingSettings, folder: Path, datasets_file: Path) -> TrainingSettings:
    """Return the settings with absolute paths, and a default repository name if one is needed."""
    changes: dict[str, Any] = {"data_backend_config": str(datasets_file)}
    if training.push_to_hub and training.hub_model_id is None:
        changes["hub_model_id"] = _repository_name(folder)
    completed = with_absolute_paths(training, folder).model_copy(update=changes)
    completed.model_fields_set.intersection_update(training.model_fields_set)
    return completed


def _repository_name(folder: Path) -> str:
    """Return the folder's name as a valid Hub repository name: no repeated dashes or dots, at most 96 characters, no .git suffix."""
    name = folder.name if folder.name.isascii() else asset_name(folder.name)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    name = re.sub(r"[-.]{2,}", "-", name).lstrip("-._")[:96]
    return re.sub(r"(\.git|[-._])+$", "", name) or "sdxl-lora"


def _broken(name: str, folder: Path, message: str, hint: str) -> InvalidProject:
    return InvalidProject(name, folder, ProjectError([Problem(folder, "", NO_VALUE, message, hint)]))
