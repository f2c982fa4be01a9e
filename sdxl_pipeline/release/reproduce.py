"""A project made from a release, and the comparison of what it has with what the release was made from. No torch.

Settings come from training_config.json, datasets, prompts, versions and digests from lineage.json. What a release does not publish, the
locations of images and of local models, comes from the user.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from sdxl_pipeline.config.json_files import read_json
from sdxl_pipeline.config.loader import CONFIG_FILE, DATASETS_FILE, PROMPT_LIBRARY, Project
from sdxl_pipeline.config.paths import NAME_OR_PATH_KEYS
from sdxl_pipeline.config.schema.datasets import ImageDataset
from sdxl_pipeline.config.schema.training import PROFILE_KEYS, TrainingSettings
from sdxl_pipeline.data.masks.mask_pairs import pairs_digest
from sdxl_pipeline.data.scan.dataset_fingerprint import dataset_digest, rows_digest
from sdxl_pipeline.files.atomic_files import sha256_path, write_text_atomic
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.models.hub_download import download_snapshot
from sdxl_pipeline.models.model_files import BaseModelError
from sdxl_pipeline.release.export import LINEAGE_FILE, SETTINGS_FILE, UNET_FOLDER, WEIGHTS_FILE
from sdxl_pipeline.release.lineage import DATASETS, GENERATED_FOLDER, GENERATOR_FILE, environment
from sdxl_pipeline.runtime.specs import EMA_FOLDER, TrainedLora

PROMPTS_FILE: Final = "prompts.json"
MARKER_FILE: Final = "reproduction.json"
"""File in the folder of a project that `reproduce` made: which release it reproduces."""

_WITHOUT_UPLOADS: Final[Mapping[str, Any]] = {
    "push_to_hub": False, "push_checkpoints_to_hub": False, "hub_model_id": None, "report_to": [], "webhook_reporting_interval": None,
}  # fmt: skip
_REQUIRED_PATHS: Final = ("pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "init_lora")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ReproduceError(Exception):
    """A release cannot be reproduced as asked; the message is one sentence with what to do."""


@dataclass(frozen=True)
class PublishedRun:
    """The two files of a release that describe its training."""

    lineage: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def project(self) -> str:
        """Name of the project that was released."""
        suffix = "/lora"
        return next(key for key in self.lineage["data_versions"] if key.endswith(suffix)).removesuffix(suffix)


def read_release(source: str) -> PublishedRun:
    """Read the release in a folder, or in a repository of the Hub. Raises ReproduceError if it has no lineage with datasets."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not _HUB_ID.fullmatch(source):
            raise ReproduceError(f"{source} is neither a folder nor a Hub id of the form owner/name")
        try:
            folder = download_snapshot(
                source,
                None,
                [LINEAGE_FILE],
                lambda names: [n for n in (LINEAGE_FILE, SETTINGS_FILE) if n in names],
            ).folder
        except BaseModelError as error:
            raise ReproduceError(str(error)) from error
    contents = []
    for name in (LINEAGE_FILE, SETTINGS_FILE):
        if not (folder / name).is_file():
            raise ReproduceError(f"{source} has no {name}, so it is not a release of this project")
        content, problems = read_json(folder / name, "an object")
        if problems or not isinstance(content, dict):
            raise ReproduceError(f"{name} of {source} is not a JSON object; download the release again")
        contents.append(content)
    missing = {"data_versions", "training_identity", "weights_sha256", "step", DATASETS} - contents[0].keys()
    if missing:
        raise ReproduceError(
            f"{LINEAGE_FILE} of {source} lacks {', '.join(sorted(missing))}: an earlier version wrote it; release the run again, or make a project by hand from {SETTINGS_FILE}"
        )
    return PublishedRun(*contents)


def write_project(
    folder: Path, run: PublishedRun, data: Mapping[str, str], paths: Mapping[str, str]
) -> list[str]:
    """Write the project's files to `folder` and return notes about what was left out.

    `data` has the location of each dataset by id, `paths` the paths of settings by key. Raises ReproduceError, without writing, if one
    is missing or unknown, or if the folder is another project.
    """
    identity = run.lineage["training_identity"]
    marker = folder / MARKER_FILE
    if any((folder / name).exists() for name in (CONFIG_FILE, DATASETS_FILE)):
        known = json.loads(marker.read_text(encoding="utf-8")) if marker.is_file() else {}
        if known.get("training_identity") != identity:
            raise ReproduceError(
                f"{folder} is another project and is not overwritten; choose another --project"
            )
    settings, notes = _settings(run, paths)
    datasets = _datasets(run, data)
    library = json.loads(PROMPT_LIBRARY.read_text(encoding="utf-8"))
    own = {"validation", *(library if settings.get("validation_prompt_library") else ())}
    prompts = {
        prompt["name"]: {"prompt": prompt["prompt"], "negative_prompt": prompt["negative_prompt"]}
        for prompt in run.lineage.get("prompts", [])
        if prompt["name"] not in own
    }
    files: dict[str, Any] = {
        MARKER_FILE: {key: run.lineage[key] for key in ("training_identity", "weights_sha256")},
        DATASETS_FILE: datasets,
    }
    if prompts:
        files[PROMPTS_FILE] = prompts
        settings["user_prompt_library"] = PROMPTS_FILE
    if "generator" in run.lineage:
        files[GENERATOR_FILE] = run.lineage["generator"]
    files[CONFIG_FILE] = settings  # last: with it the folder is a project
    for name, content in files.items():
        write_text_atomic(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return notes


def _settings(run: PublishedRun, paths: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return config.json: settings that are not the default, those that a hardware profile would set, and the given paths."""
    if unknown := sorted(paths.keys() - set(NAME_OR_PATH_KEYS)):
        raise ReproduceError(
            f"--path {unknown[0]} is not a setting with a path; write one of {', '.join(NAME_OR_PATH_KEYS)}"
        )
    published = {**run.settings, **_WITHOUT_UPLOADS}
    if not run.lineage.get("is_final", True):
        published["checkpoints_total_limit"] = None  # the released checkpoint must not be deleted
    plain = TrainingSettings().model_dump(mode="json")
    settings = {
        key: value
        for key, value in published.items()
        if value is not None and (key in PROFILE_KEYS or key not in plain or value != plain[key])
    }
    notes = []
    for key in NAME_OR_PATH_KEYS:
        value = settings.get(key)
        if key in paths:
            settings[key] = (
                str(Path(paths[key]).expanduser().resolve()) if Path(paths[key]).exists() else paths[key]
            )
        elif isinstance(value, str) and not _is_portable(key, value):
            if key in _REQUIRED_PATHS:
                raise ReproduceError(
                    f"{key} of the release was the local file or folder {value}; add --path {key}=PATH"
                )
            del settings[key]
            if key != "resume_from_checkpoint":
                notes.append(
                    f"{key} was the local file or folder {value}; the default is used, which does not affect the weights"
                )
    ancestor = run.lineage.get("ancestor")
    if ancestor and not ancestor["same_trajectory"] and "resume_from_checkpoint" not in paths:
        raise ReproduceError(
            f"the run started from step {ancestor['step']} of run {ancestor['identity'][:16]}, which the release does not contain; add --path resume_from_checkpoint=CHECKPOINT"
        )
    if run.lineage.get("base_model_revision") and "pretrained_model_name_or_path" not in paths:
        settings["revision"] = run.lineage["base_model_revision"]
    elif "pretrained_model_name_or_path" in paths:
        settings.pop("revision", None)
    return settings, notes


def _is_portable(key: str, value: str) -> bool:
    """Return whether a published name means the same on every machine."""
    if key == "resume_from_checkpoint":
        return value == "latest"
    return value.startswith("bundled:") or (
        _HUB_ID.fullmatch(value) is not None and not value.lower().endswith(".safetensors")
    )


def _datasets(run: PublishedRun, data: Mapping[str, str]) -> list[dict[str, Any]]:
    entries = [dict(entry) for entry in run.lineage[DATASETS]]
    ids = [entry["id"] for entry in entries if entry["dataset_type"] != "text_embeds"]
    if unknown := sorted(data.keys() - set(ids)):
        raise ReproduceError(f"--data {unknown[0]} is not a dataset of the release; it has {', '.join(ids)}")
    missing: list[str] = []
    for entry in entries:
        generated = entry.pop(GENERATED_FOLDER, None)
        if entry["dataset_type"] == "text_embeds" or (
            entry["type"] == "huggingface" and entry["id"] not in data
        ):
            continue
        location = data.get(entry["id"], generated)
        if location is None:
            missing.append(f"{entry['id']} ({_location_kind(entry)})")
        else:
            entry |= _location(entry, location, is_generated=entry["id"] not in data)
    if missing:
        raise ReproduceError(
            f"the release does not contain the images of {', '.join(missing)}; add --data ID=LOCATION for each"
        )
    return entries


def _location_kind(entry: Mapping[str, Any]) -> str:
    return {"csv": "a CSV file", "aws": "a folder or URL"}.get(entry["type"], "a folder")


def _location(entry: Mapping[str, Any], location: str, is_generated: bool) -> dict[str, Any]:
    """Return the fields of a dataset for a folder, a URL or a CSV file."""
    if "://" in location:
        return {"type": "aws", "url": location}
    if is_generated:
        return {"instance_data_dir": location}
    path = Path(location).expanduser().resolve()
    if entry["type"] == "huggingface":
        raise ReproduceError(
            f"--data {entry['id']} is not needed: the images come from {entry.get('dataset_name')} on the Hub; remove it"
        )
    if entry["type"] == "csv":
        if not path.is_file():
            raise ReproduceError(
                f"--data {entry['id']}={location} is not a file; give the CSV file with the URLs"
            )
        return {"csv_file": str(path)}
    if not path.is_dir():
        raise ReproduceError(
            f"--data {entry['id']}={location} is not a folder; give the folder of the images"
        )
    return {"type": "local", "instance_data_dir": str(path)}


def compare_inputs(run: PublishedRun, project: Project, values: Path) -> list[str]:
    """Return one sentence for each component of the base model and each dataset whose digest is missing or differs.

    `values` is the folder of the assets' values, in which `base_model`, `dataset`, `aspect_buckets` and `masks` must be current.
    """
    model = ResolvedModel.model_validate_json((values / project.name / "base_model.json").read_bytes())
    differences = [
        f"base model: {component} differs: {_short(digest)} in the release, {_short(model.digests.get(component))} here"
        for component, digest in run.lineage["base_model_digests"].items()
        if model.digests.get(component) != digest
    ]
    for dataset in project.datasets:
        differences += _compare_dataset(run, dataset, project.masks_of(dataset), values / project.name)
    return differences


def _compare_dataset(
    run: PublishedRun, dataset: ImageDataset, masks: ImageDataset | None, values: Path
) -> list[str]:
    stages: list[tuple[str, str, Callable[[pd.DataFrame], str]]] = [
        ("dataset", "images or captions", dataset_digest),
        ("aspect_buckets", "crops or split", rows_digest),
    ]
    if masks is not None:
        kind = masks.conditioning_type
        stages.append(("masks", "masks", lambda pairs: digest_json([kind, pairs_digest(pairs)])))
    differences = []
    for stage, what, digest_of in stages:
        name = dataset.stage_name(stage)
        expected, path = run.lineage["data_versions"].get(f"{run.project}/{name}"), values / f"{name}.parquet"
        digest = digest_of(pd.read_parquet(path)) if path.is_file() else None
        if digest != expected:
            differences.append(
                f"dataset {dataset.id}: {what} differ: {_short(expected)} in the release, {_short(digest)} here"
            )
    counts = run.lineage.get("images", {}).get(dataset.id)
    plan = values / f"{dataset.stage_name('aspect_buckets')}.parquet"
    if differences and counts and plan.is_file():
        here, released = pd.read_parquet(plan, columns=["path"])["path"].nunique(), sum(counts.values())
        differences[0] += f" ({here} images here, {released} in the release)"
    return differences


def compare_environment(run: PublishedRun) -> list[str]:
    """Return one sentence for each version that differs from the release's, which may change the last bits of the weights."""
    here = environment()
    return [
        f"{name} {here.get(name, 'is not installed')} here, {version} in the release"
        for name, version in run.lineage.get("environment", {}).items()
        if here.get(name) != version
    ]


def compare_weights(run: PublishedRun, lora: TrainedLora) -> tuple[bool, str]:
    """Return whether the trained weights have the released bytes, and one sentence about it."""
    expected, step = run.lineage["weights_sha256"], run.lineage["step"]
    path = Path(lora.weights_path)
    if step != lora.steps:
        folder = Path(lora.run_dir) / "checkpoints" / f"step-{step:08d}"
        folder = (
            folder / EMA_FOLDER
            if run.lineage.get("weights") == "ema" and (folder / EMA_FOLDER).is_dir()
            else folder
        )
        path = folder / (UNET_FOLDER if lora.weights_kind == "unet" else WEIGHTS_FILE)
        if not path.exists():
            return False, f"the release is step {step}, and {Path(lora.run_dir).name} has no checkpoint of it"
    found = sha256_path(path)
    if found == expected:
        return True, f"the weights of step {step} have the released bytes: SHA-256 {found}"
    reason = (
        "the run is the same, so the device, the number of threads or a version computes other last bits"
        if lora.identity == run.lineage["training_identity"]
        else f"it is another run, {lora.identity[:16]} instead of {run.lineage['training_identity'][:16]}"
    )
    return (
        False,
        f"the weights of step {step} differ: SHA-256 {expected[:16]} in the release, {found[:16]} here; {reason}",
    )


def _short(digest: str | None) -> str:
    return "missing" if digest is None else digest[:16]
