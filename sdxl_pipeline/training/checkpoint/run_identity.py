"""What a run is: the digest of everything that decides its result. No torch.

The same identity again means the same LoRA, so a finished run is reused and an unfinished one resumed. A key of the settings belongs
to the identity by its value unless its `Key` says otherwise, so a new key is part of the identity by default.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sdxl_pipeline.config.schema.checkpoints import CHECKPOINT_STATE
from sdxl_pipeline.config.schema.key_facts import COMPARED_BY_VALUE, Identity, keys_with
from sdxl_pipeline.config.schema.training import LENGTH_KEYS, TrainingSettings
from sdxl_pipeline.files.atomic_files import sha256_file
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.models.adapters.adapter_files import AdapterError
from sdxl_pipeline.models.adapters.init_adapter_source import initial_adapter_digest
from sdxl_pipeline.runtime.specs import TrainSpec
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.checkpoint.run_lineage import chosen_checkpoint, lineage_of_checkpoint
from sdxl_pipeline.training.data.mask_tables import masks_identity
from sdxl_pipeline.training.data.samples import Samples, load_samples
from sdxl_pipeline.training.data.sampling_weights import plan_sampling_weights, sampling_weights_per_epoch

CODE_VERSION = 3
"""Raise it when a change of the trainer changes the numbers it computes."""

CONSTANT_SCHEDULES = frozenset({"constant", "constant_with_warmup", "sine"})
"""The values of lr_scheduler whose learning rate at a step does not depend on the number of steps."""

_NOT_BY_VALUE = set(keys_with(TrainingSettings, lambda key: key.identity is not Identity.VALUE))
_CHANGES_WEIGHTS = frozenset(keys_with(TrainingSettings, lambda key: key.identity in COMPARED_BY_VALUE))


def settings_affecting_weights(settings: TrainingSettings) -> dict[str, Any]:
    """The settings that decide the weights, as plain data."""
    return settings.model_dump(mode="json", exclude=_NOT_BY_VALUE) | {
        "lora_alpha": settings.effective_lora_alpha
    }


_MACHINE = ("device", "num_processes", "cpu_threads")


def setting_changes(before: TrainSpec, after: TrainSpec) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two specs, by name: both values as plain data, those of the machine included."""

    def values(spec: TrainSpec) -> dict[str, Any]:
        settings = spec.settings.model_dump(mode="json") | {"lora_alpha": spec.settings.effective_lora_alpha}
        return settings | {key: getattr(spec.hardware, key) for key in _MACHINE}

    old, new = values(before), values(after)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def decides_weights(key: str) -> bool:
    """Return whether another value of one of the `setting_changes` makes other weights."""
    return key in _CHANGES_WEIGHTS or key == "num_processes"


class RunFingerprints(NamedTuple):
    """Digests that name a run, hex SHA-256 each."""

    identity: str
    trajectory: str
    """Runs of one trajectory take the same steps as far as both of them go."""
    any_length: str
    """Runs of one family differ in their length alone, on which the steps may depend."""
    any_length_or_world_size: str
    """Runs of one kin differ in their length and in the number of processes alone."""


def run_identity(spec: TrainSpec) -> str:
    """The first of `run_fingerprints`."""
    return run_fingerprints(spec).identity


def run_fingerprints(spec: TrainSpec) -> RunFingerprints:
    """What the run is called. Reads the datasets' tables; raises UserError when they do not fit together.

    The device is not part of it, nor is the number of CPU threads: a LoRA trained on a GPU is the same run on a laptop, although the
    last bits would differ. The number of processes is, since it multiplies the batch. A checkpoint to begin from is part of it, unless
    its run is of the same trajectory.
    """
    settings = spec.settings
    samples = load_samples(spec.datasets, "train", settings.micro_conditioning)
    content = _content(spec, samples)
    # the passes too may have been raised for the processes
    any_processes = {"num_processes": None, "passes": sampling_weights_per_epoch(spec.datasets, samples)}
    any_length_or_world_size = _without_length(content | any_processes)
    names = _names(settings, content, any_length_or_world_size)
    chosen = chosen_checkpoint(settings)
    if chosen is not None:
        lineage = lineage_of_checkpoint(chosen)
        if lineage is None or lineage.trajectory != names.trajectory:
            begins_from = {"begins_from": sha256_file(chosen / CHECKPOINT_STATE)}
            return _names(settings, content | begins_from, any_length_or_world_size | begins_from)
    return names


def _names(
    settings: TrainingSettings, content: Mapping[str, Any], any_length_or_world_size: Mapping[str, Any]
) -> RunFingerprints:
    identity, any_length = digest_json(content), digest_json(_without_length(content))
    constant = settings.is_schedule_free or settings.lr_scheduler in CONSTANT_SCHEDULES
    return RunFingerprints(
        identity, any_length if constant else identity, any_length, digest_json(any_length_or_world_size)
    )


def _without_length(content: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in content["settings"].items() if key not in LENGTH_KEYS}
    return {**content, "settings": kept}


def _start(settings: TrainingSettings) -> str | None:
    try:
        return initial_adapter_digest(settings.init_lora)
    except AdapterError as error:
        raise UserError(f"config.json: init_lora: {error}") from error


def _content(spec: TrainSpec, samples: Samples) -> dict[str, Any]:
    trained = samples.images_by_dataset()
    return {
        "code_version": CODE_VERSION,
        "base_model": spec.base_model.digest,
        "samples": samples.digest(),
        "passes": plan_sampling_weights(
            spec.datasets, samples, spec.settings, spec.hardware.num_processes
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
        "starts_from": _start(spec.settings),
        "settings": settings_affecting_weights(spec.settings),
        "num_processes": spec.hardware.num_processes,
    }
