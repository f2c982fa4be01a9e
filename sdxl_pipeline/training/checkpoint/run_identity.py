"""The identity of a run: the digest of everything that determines its result. Imports no torch.

The same identity means the same LoRA, so a finished run is reused and an unfinished one resumed. A settings key is part of the identity
unless it is listed below with the reason why it cannot change the weights. A new key is thus included by default, and the worst
consequence of a forgotten entry is a repeated training.
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
from sdxl_pipeline.training.checkpoint.run_lineage import configured_checkpoint, lineage_of_checkpoint
from sdxl_pipeline.training.data.mask_tables import masks_identity
from sdxl_pipeline.training.data.samples import Samples, load_samples
from sdxl_pipeline.training.data.sampling_weights import plan_sampling_weights, sampling_weights_per_epoch

CODE_VERSION = 3
"""Increase it when a change of the trainer changes its numerical results."""

LENGTH_KEYS = ("max_train_steps", "num_train_epochs")

CONSTANT_SCHEDULES = frozenset({"constant", "constant_with_warmup", "sine"})
"""The values of lr_scheduler whose learning rate at a step does not depend on the number of steps."""

EXCLUDED: Mapping[str, tuple[str, ...]] = {
    "represented by the base model's digest": (
        "model_family",
        "model_flavour",
        "pretrained_model_name_or_path",
        "pretrained_vae_model_name_or_path",
        "revision",
    ),
    "represented by the samples' keys and sizes": (
        "data_backend_config",
        "resolution",
        "resolution_type",
        "minimum_image_size",
        "maximum_image_size",
        "target_downsample_size",
        "max_upscale_threshold",
        "aspect_bucket_rounding",
        "aspect_bucket_alignment",
        "caption_strategy",
        "instance_prompt",
        "prepend_instance_prompt",
        "only_instance_prompt",
        "disable_multiline_split",
        "skip_file_discovery",
        "tokenizer_max_length",
        "vae_cache_ondemand",
        "vae_cache_disable",
        "vae_cache_clear_each_epoch",
        "text_cache_ondemand",
        "text_cache_disable",
        "eval_holdout_share",
        "micro_conditioning",
        "vae_dtype",
    ),
    "represented by the sampling weights": ("allow_dataset_oversubscription",),
    "they affect speed and memory, not results": (
        "gradient_checkpointing",
        "attention_mechanism",
        "dynamo_backend",
        "dynamo_mode",
        "dynamo_fullgraph",
        "dynamo_dynamic",
        "dynamo_use_regional_compilation",
        "fsdp_enable",
        "fsdp_version",
        "fsdp_reshard_after_forward",
        "gradient_checkpointing_interval",
        "ema_device",
        "vae_batch_size",
        "text_encoder_batch_size",
        "write_batch_size",
    ),
    "they control where and how often to save": (
        "output_dir",
        "released_weights",
        "checkpoint_step_interval",
        "checkpoint_epoch_interval",
        "checkpoints_total_limit",
        "checkpointing_rolling_steps",
        "checkpoints_rolling_total_limit",
        "disk_low_threshold",
        "disk_low_action",
        "resume_from_checkpoint",
    ),
    "validation and evaluation do not influence the weights": (
        "validation_disable",
        "ema_validation",
        "validation_prompt",
        "user_prompt_library",
        "validation_prompt_library",
        "validation_disable_unconditional",
        "validation_negative_prompt",
        "validation_resolution",
        "validation_guidance",
        "validation_guidance_rescale",
        "validation_num_inference_steps",
        "validation_noise_scheduler",
        "inference_scheduler_timestep_spacing",
        "validation_seed",
        "validation_step_interval",
        "validation_epoch_interval",
        "validation_on_startup",
        "num_validation_images",
        "validation_randomize",
        "validation_preview",
        "validation_preview_steps",
        "validation_preview_model_name_or_path",
        "evaluation_type",
        "pretrained_evaluation_model_name_or_path",
        "eval_loss_disable",
        "eval_timesteps",
        "num_eval_images",
        "eval_dataset_id",
        "eval_steps_interval",
        "eval_epoch_interval",
    ),
    "they select the formats of the exported weights": (
        "lora_format",
        "lora_export_dtype",
        "metadata_include_captions",
    ),
    "they control publishing, tracking and scheduling": (
        "push_to_hub",
        "push_checkpoints_to_hub",
        "hub_model_id",
        "model_card_private",
        "model_card_note",
        "report_to",
        "tracker_project_name",
        "tracker_run_name",
        "logging_dir",
        "webhook_config",
        "webhook_reporting_interval",
        "retraining_cron",
    ),
    "represented by the digest of its file's content": ("init_lora",),
    "included with its default resolved": ("lora_alpha",),
}


def settings_affecting_weights(settings: TrainingSettings) -> dict[str, Any]:
    """Return the settings that determine the weights, as plain data."""
    excluded = {key for keys in EXCLUDED.values() for key in keys}
    included = {key: value for key, value in settings.model_dump(mode="json").items() if key not in excluded}
    return included | {"lora_alpha": settings.effective_lora_alpha}


_EXCLUDED_BUT_RELEVANT = frozenset(("init_lora", "lora_alpha", "vae_dtype"))
"""The settings in `EXCLUDED` whose value nevertheless changes the weights, through what represents them."""

_HARDWARE = ("device", "num_processes", "cpu_threads")


def setting_changes(before: TrainSpec, after: TrainSpec) -> dict[str, tuple[Any, Any]]:
    """Return the settings and hardware fields that differ between two specs, by name: both values as plain data."""

    def values(spec: TrainSpec) -> dict[str, Any]:
        settings = spec.settings.model_dump(mode="json") | {"lora_alpha": spec.settings.effective_lora_alpha}
        return settings | {key: getattr(spec.hardware, key) for key in _HARDWARE}

    old, new = values(before), values(after)
    return {key: (old[key], new[key]) for key in new if old[key] != new[key]}


def decides_weights(key: str) -> bool:
    """Return whether a change of one of the `setting_changes` changes the weights."""
    excluded = {name for names in EXCLUDED.values() for name in names} | {"device", "cpu_threads"}
    return key in _EXCLUDED_BUT_RELEVANT or key not in excluded


class RunFingerprints(NamedTuple):
    """Digests that identify a run, hex SHA-256 each."""

    identity: str
    trajectory: str
    """Runs of the same trajectory take identical steps as far as both of them go."""
    any_length: str
    """Without the length, on which the steps may depend."""
    any_length_or_world_size: str
    """Without the length and the number of processes."""


def run_identity(spec: TrainSpec) -> str:
    """Return the identity of `run_fingerprints`."""
    return run_fingerprints(spec).identity


def run_fingerprints(spec: TrainSpec) -> RunFingerprints:
    """Return the fingerprints of a run. Reads the datasets' tables; raises UserError if they are inconsistent.

    The device and the number of CPU threads are not part of them: a LoRA trained on a GPU is the same run on a laptop, although the last
    bits differ. The number of processes is, since it multiplies the batch size. A configured checkpoint is part of them unless its run has
    the same trajectory.
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
        if lineage is None or lineage.trajectory != fingerprints.trajectory:
            begins_from = {"begins_from": sha256_file(checkpoint / CHECKPOINT_STATE)}
            return _fingerprints(settings, content | begins_from, any_length_or_world_size | begins_from)
    return fingerprints


def _fingerprints(
    settings: TrainingSettings, content: Mapping[str, Any], any_length_or_world_size: Mapping[str, Any]
) -> RunFingerprints:
    identity, any_length = digest_json(content), digest_json(_without_length(content))
    constant = settings.is_schedule_free or settings.lr_scheduler in CONSTANT_SCHEDULES
    return RunFingerprints(
        identity, any_length if constant else identity, any_length, digest_json(any_length_or_world_size)
    )


def _without_length(content: Mapping[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in content["settings"].items() if key not in LENGTH_KEYS}
    return {**content, "settings": settings}


def _init_adapter_digest(settings: TrainingSettings) -> str | None:
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
        "starts_from": _init_adapter_digest(spec.settings),
        "settings": settings_affecting_weights(spec.settings),
        "num_processes": spec.hardware.num_processes,
    }
