"""The identity of a run: the digest of everything that determines its result. Imports no torch.

The same identity means the same LoRA, so a finished run is reused and an unfinished one resumed. A settings key is part of the identity
by its value unless its `Key` states otherwise, so a new key is included by default, and the worst consequence of a forgotten fact is a
repeated training.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from sdxl_pipeline.config.paths import (
    CHECKPOINT_HINT,
    NOT_A_CHECKPOINT,
    checkpoint_path_of,
    is_checkpoint,
)
from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE, CheckpointSettings
from sdxl_pipeline.config.schema.key_facts import COMPARED_BY_VALUE, Identity, keys_with
from sdxl_pipeline.config.schema.training import LENGTH_KEYS, TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file, write_text_atomic
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.adapters.adapter_files import AdapterError
from sdxl_pipeline.models.adapters.init_adapter_source import initial_adapter_digest
from sdxl_pipeline.runtime.specs import RunLineage, TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.mask_tables import masks_identity
from sdxl_pipeline.training.data.samples import Samples, load_samples
from sdxl_pipeline.training.data.training_plan import plan_sampling_weights, sampling_weights_per_epoch
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples

LINEAGE_FILE = "lineage.json"
SPEC_FILE = "spec.json"
"""The training spec beside the weights it produced, read by the evaluation and by later runs."""


def write_lineage(run_dir: Path, lineage: RunLineage) -> None:
    """Write a run's lineage to its folder."""
    write_text_atomic(run_dir / LINEAGE_FILE, lineage.model_dump_json(indent=2) + "\n")


def read_lineage(run_dir: Path) -> RunLineage | None:
    """Return what `write_lineage` wrote; None for a folder without a run, or with one of an earlier version."""
    try:
        return RunLineage.model_validate_json((run_dir / LINEAGE_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def read_spec(run_dir: Path) -> TrainSpec | None:
    """Return the spec of the run in a folder; None if there is none, or one of another version."""
    try:
        return TrainSpec.model_validate_json((run_dir / SPEC_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def lineage_of_checkpoint(path: Path) -> RunLineage | None:
    """Return the lineage of the run that a checkpoint belongs to, wherever it is stored; None if unknown."""
    state = _read_state(path)
    try:
        return RunLineage.model_validate(state.get("lineage"))
    except ValidationError:  # written by an earlier version, which stored it only in the folder of the run
        run = run_of_checkpoint(path)
        return None if run is None else read_lineage(run)


def run_of_checkpoint(path: Path) -> Path | None:
    """Return the folder of the run that contains a checkpoint, `<run>/checkpoints/step-00000500`; None if it is stored elsewhere."""
    run = path.parent.parent
    lineage = read_lineage(run)
    is_of_run = lineage is not None and lineage.identity == _read_state(path).get("identity")
    return run if is_of_run else None


def configured_checkpoint(settings: CheckpointSettings) -> Path | None:
    """Return the path in `resume_from_checkpoint`; None for "latest" and for a start from step 0.

    Raises UserError if there is no checkpoint at it.
    """
    path = checkpoint_path_of(settings.resume_from_checkpoint, Path())
    if path is not None and not is_checkpoint(path):
        raise UserError(
            f"config.json: resume_from_checkpoint is {path}, {NOT_A_CHECKPOINT}; {CHECKPOINT_HINT}"
        )
    return path and path.resolve()


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads((path / CHECKPOINT_STATE).read_bytes())
    except (OSError, ValueError):  # reported as corrupt when the run resumes from it
        return {}
    return state if isinstance(state, dict) else {}


CODE_VERSION = 3
"""Increase it when a change of the trainer changes its numerical results."""

CONSTANT_SCHEDULES = frozenset({"constant", "constant_with_warmup", "sine"})
"""The values of lr_scheduler whose learning rate at a step does not depend on the number of steps."""

_NOT_BY_VALUE = set(keys_with(TrainingSettings, lambda key: key.identity is not Identity.VALUE))
_VALUE_IF_SET = keys_with(TrainingSettings, lambda key: key.identity is Identity.VALUE_IF_SET)
_AFFECTS_WEIGHTS = frozenset(keys_with(TrainingSettings, lambda key: key.identity in COMPARED_BY_VALUE))


def settings_affecting_weights(settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that determine the weights, as plain data; those of `Identity.VALUE_IF_SET` only if they are not the default."""
    dumped = settings.model_dump(mode="json")
    if_set = (
        key for key in _VALUE_IF_SET if getattr(settings, key) != TrainingSettings.model_fields[key].default
    )
    return {
        **{key: value for key, value in dumped.items() if key not in _NOT_BY_VALUE},
        **{key: dumped[key] for key in if_set},
        "lora_alpha": settings.effective_lora_alpha,
    }


_HARDWARE = ("device", "num_processes", "cpu_threads")


def setting_changes(before: TrainSpec, after: TrainSpec) -> dict[str, tuple[Any, Any]]:
    """Return the settings and hardware fields that differ between two specs, by name: both values as plain data."""

    def values(spec: TrainSpec) -> dict[str, Any]:
        settings = spec.settings.model_dump(mode="json") | {"lora_alpha": spec.settings.effective_lora_alpha}
        return settings | {key: getattr(spec.hardware, key) for key in _HARDWARE}

    old, new = values(before), values(after)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def change_affects_weights(key: str) -> bool:
    """Return whether a change of one of the `setting_changes` changes the weights."""
    return key in _AFFECTS_WEIGHTS or key == "num_processes"


class RunFingerprints(NamedTuple):
    """Digests that identify a run, hex SHA-256 each."""

    identity: str
    trajectory: str
    """Runs of the same trajectory take identical steps as far as both of them go."""
    any_length: str
    """Without the length, on which the steps may depend."""
    any_length_or_world_size: str
    """Without the length and the number of processes."""
    early_stopping: str | None
    """All that decides where early stopping ends the run; None without it."""


def run_identity(spec: TrainSpec) -> str:
    """Return the identity of `run_fingerprints`."""
    return run_fingerprints(spec).identity


def run_fingerprints(spec: TrainSpec) -> RunFingerprints:
    """Return the fingerprints of a run. Reads the datasets' tables; raises UserError if they are inconsistent.

    The device and the number of CPU threads are not part of them: a LoRA trained on a GPU is the same run on a laptop, although the last
    bits differ. The number of processes is, since it multiplies the batch size. A configured checkpoint is part of them unless its run has
    the same trajectory. With early stopping it always is, because the eval losses before it may be unknown.

    Where early stopping ends a run is part of its identity, but not of its trajectory: a run without early stopping continues a stopped one.
    """
    settings = spec.settings
    samples = load_samples(spec.datasets, "train", settings.micro_conditioning)
    content = _content(spec, samples)
    # sampling weights too may have been raised for the number of processes
    any_processes = {"num_processes": None, "passes": sampling_weights_per_epoch(spec.datasets, samples)}
    any_length_or_world_size = _without_length(content | any_processes)
    fingerprints = _fingerprints(settings, content, any_length_or_world_size)
    checkpoint = configured_checkpoint(settings)
    if checkpoint is not None:
        lineage = lineage_of_checkpoint(checkpoint)
        stops_early = fingerprints.early_stopping is not None
        if stops_early or lineage is None or lineage.trajectory != fingerprints.trajectory:
            begins_from = {"begins_from": sha256_file(checkpoint / CHECKPOINT_STATE)}
            return _fingerprints(settings, content | begins_from, any_length_or_world_size | begins_from)
    return fingerprints


def _fingerprints(
    settings: TrainingSettings, content: Mapping[str, Any], any_length_or_world_size: Mapping[str, Any]
) -> RunFingerprints:
    constant = settings.is_schedule_free or settings.lr_scheduler in CONSTANT_SCHEDULES
    steps = {key: value for key, value in content.items() if key != EARLY_STOPPING}
    steps = _without_settings(steps, _EARLY_STOPPING_KEYS)
    early_stopping = content.get(EARLY_STOPPING)
    return RunFingerprints(
        identity=digest_json(content),
        trajectory=digest_json(_without_length(steps) if constant else steps),
        any_length=digest_json(_without_length(content)),
        any_length_or_world_size=digest_json(any_length_or_world_size),
        early_stopping=early_stopping and digest_json(early_stopping),
    )


def _without_length(content: Mapping[str, Any]) -> dict[str, Any]:
    return _without_settings(content, LENGTH_KEYS)


def _without_settings(content: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    settings = {key: value for key, value in content["settings"].items() if key not in keys}
    return {**content, "settings": settings}


EARLY_STOPPING = "early_stopping"
"""Key in the content of an identity, present only with early stopping."""

_EARLY_STOPPING_KEYS = ("early_stopping_patience", "early_stopping_min_delta")


def _early_stopping(spec: TrainSpec) -> dict[str, Any] | None:
    """Return all that decides where early stopping ends a run, beside its steps; None without early stopping.

    Raises UserError without held-out images: the eval loss of training images falls until the end.
    """
    settings = spec.settings
    if settings.early_stopping_patience is None:
        return None
    source, samples = select_eval_samples(spec.datasets, settings, settings.micro_conditioning)
    if source == "training images" or not samples:
        raise UserError(
            f"config.json: early_stopping_patience is {settings.early_stopping_patience}, but no image is held out for the eval loss. "
            "Set eval_holdout_share, add an eval dataset, or remove early_stopping_patience"
        )
    keys = (*_EARLY_STOPPING_KEYS, "eval_steps_interval", "eval_epoch_interval", "eval_timesteps")
    return {
        **{key: getattr(settings, key) for key in keys},
        "weights": settings.released_weights if settings.use_ema else "trained",
        "source": source,
        "samples": samples.digest(),
    }


def _init_adapter_digest(settings: TrainingSettings) -> str | None:
    try:
        return initial_adapter_digest(settings.init_lora)
    except AdapterError as error:
        raise UserError(f"config.json: init_lora: {error}") from error


def _content(spec: TrainSpec, samples: Samples) -> dict[str, Any]:
    trained = samples.images_by_dataset()
    early_stopping = _early_stopping(spec)
    return {
        **({} if early_stopping is None else {EARLY_STOPPING: early_stopping}),
        "code_version": CODE_VERSION,
        "base_model": spec.base_model.digest,
        "samples": samples.digest(),
        "passes": plan_sampling_weights(
            spec.datasets,
            samples,
            spec.settings,
            spec.hardware.num_processes,
            spec.settings.allow_dataset_oversubscription,
        ).by_dataset,
        "fresh_crops": sorted(
            dataset.dataset_id
            for dataset in spec.datasets
            if dataset.fresh_crops and dataset.dataset_id in trained
        ),
        "masks": masks_identity(spec.datasets, samples),
        "regularisation": sorted(
            dataset.dataset_id
            for dataset in spec.datasets
            if dataset.is_regularisation and dataset.dataset_id in trained
        ),
        "starts_from": _init_adapter_digest(spec.settings),
        "settings": settings_affecting_weights(spec.settings),
        "num_processes": spec.hardware.num_processes,
    }
