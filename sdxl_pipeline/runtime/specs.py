"""Specs (inputs) and manifests (outputs) of the device stages.

A spec is written to JSON by the asset that launches the stage; the stage writes its manifest last, atomically. Both are plain data: paths
are absolute strings, without tensors and secrets. Torch is not imported here, so that the code location can read manifests quickly.
"""

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from sdxl_pipeline.config.hardware_profiles import Hardware
from sdxl_pipeline.config.schema.datasets import CacheMode, MaskKind
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel


class StageModel(BaseModel):
    """A frozen record that rejects unknown keys, so that a spec and the program reading it cannot diverge."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")  # a loss may be NaN


class FailedItem(StageModel):
    """One image or caption that a stage could not process."""

    name: str = Field(description="Path of the image within its dataset, or the caption.")
    reason: str = Field(description="Why, with a fix.")


class EncodeLatentsSpec(StageModel):
    """Input of `sdxl_pipeline.stages.encode_latents`: VAE-encode the crops of one dataset."""

    base_model: ResolvedModel = Field(description="The base model whose VAE encodes.")
    hardware: Hardware = Field(description="Device, precision and batch sizes.")
    data_dir: str = Field(description="Folder that the rows' `path` column is relative to.")
    rows_path: str = Field(description="Parquet of the dataset's aspect_buckets rows.")
    store_root: str = Field(description="Root of the content-addressed latent store.")
    entries_path: str = Field(
        description="Parquet to write: path, crop_index, key, latent_key, one row per encoded crop."
    )
    sample_path: str = Field(description="PNG to write: some crops beside their decoded latents.")
    mode: CacheMode = Field(
        default="full", description="full encodes now; ondemand and disable defer it to the training."
    )
    trust_manifest: bool = Field(
        default=False,
        description="Reuse a finished manifest of these rows without verifying the store (skip_file_discovery: vae).",
    )


class LatentCache(StageModel):
    """Output of `encode_latents`. `digest` covers images, crop indices and latent keys, independent of order and file names."""

    identity: str = Field(description="Digest of all inputs.")
    store_root: str
    entries_path: str
    digest: str
    planned: int = Field(description="Crops to encode.")
    encoded: int
    reused: int
    deferred: int = Field(default=0, description="Deferred to the training by the cache mode.")
    failed: tuple[FailedItem, ...] = Field(
        description="Unreadable or non-finite; planned = encoded + reused + deferred + failed."
    )
    seconds: float
    images_per_second: float | None = Field(
        description="Encoded crops per second of all processes, without loading the VAE; None when nothing was encoded."
    )
    vae_busy: float | None = Field(
        default=None, description="Share of that time spent in the VAE; None if nothing was encoded."
    )
    bytes: int = Field(description="Bytes of this dataset's latents in the store.")
    latent_mean: tuple[float, ...] = Field(
        description="Per channel, of the scaled posterior means of `measured` crops; empty when none was measured."
    )
    latent_std: tuple[float, ...]
    measured: int = Field(
        default=0,
        description="Number of latents behind mean and deviation: all, or a random sample by their keys.",
    )
    sample_path: str | None


class EncodeTextSpec(StageModel):
    """Input of `sdxl_pipeline.stages.encode_text`: encode the captions of one dataset, the empty prompt and the extra prompts."""

    base_model: ResolvedModel
    hardware: Hardware
    captions_path: str = Field(
        description="Parquet with the columns path, key, caption; one row per (image, caption)."
    )
    extra_prompts: tuple[str, ...] = Field(
        description="Validation and negative prompts; the empty prompt is always added."
    )
    store_root: str
    entries_path: str = Field(description="Parquet to write: path, key, caption, embed_key.")
    prompts_path: str = Field(
        description="Parquet to write: prompt, embed_key for the empty prompt and extra_prompts."
    )
    shard_rows: int = Field(default=128, ge=1, description="Captions written per shard (write_batch_size).")
    windows: int = Field(
        default=1,
        ge=1,
        description="Windows of 77 tokens per caption, encoded separately and concatenated.",
    )
    mode: CacheMode = Field(
        default="full",
        description="full encodes now; ondemand and disable defer it to the training.",
    )
    trust_manifest: bool = Field(
        default=False,
        description="Reuse a finished manifest of these captions without verifying the store (skip_file_discovery: text).",
    )


class TextEmbedCache(StageModel):
    """Output of `encode_text`. `digest` covers images and their captions' keys, independent of order and file names."""

    identity: str = Field(description="Digest of all inputs.")
    store_root: str
    entries_path: str
    prompts_path: str
    digest: str
    captions: int = Field(description="Distinct captions, including extra prompts and the empty prompt.")
    encoded: int
    reused: int
    deferred: int = Field(default=0, description="Deferred to the training by the cache mode.")
    windows: int = Field(default=1, description="Windows of 77 tokens per caption.")
    truncated: tuple[str, ...] = Field(
        description="The first captions that are longer than their windows and were truncated."
    )
    truncated_tails: tuple[str, ...] = Field(
        default=(), description="The removed text of each caption in `truncated`, in the same order."
    )
    truncated_count: int | None = Field(
        default=0,
        description="Number of truncated captions; None where the training encodes them without counting.",
    )
    seconds: float
    captions_per_second: float | None = Field(
        description="Encoded captions per second of all processes, without loading the encoders; None when none was encoded."
    )
    bytes: int = Field(description="Bytes of these embeddings in the store.")


class DatasetMasks(StageModel):
    """Masks of one dataset's images."""

    kind: MaskKind
    data_dir: str = Field(description="Folder that `mask_path` is relative to.")
    pairs_path: str = Field(
        description="Parquet: path, key, mask_path, mask_key, one row per image that has a mask."
    )


class TrainingDataset(StageModel):
    """A dataset as the trainer reads it: its crop plan joined with its caches on `path`."""

    dataset_id: str
    data_dir: str = Field(description="Folder of the images, for latents that are encoded during training.")
    rows_path: str = Field(description="Parquet of aspect_buckets rows; `split` is train or eval.")
    latents: LatentCache
    text_embeds: TextEmbedCache
    repeats: int = Field(default=0, ge=0, description="Additional repeats per epoch; 0 is one appearance.")
    probability: float = Field(default=1.0, gt=0, description="Relative sampling weight.")
    latent_cache: CacheMode = "full"
    text_cache: CacheMode = "full"
    fresh_crops: bool = Field(
        default=False,
        description="Choose a new random crop of the resized image in every epoch (vae_cache_clear_each_epoch).",
    )
    instance_prompt: str | None = Field(
        default=None,
        description="Trigger words of the dataset, written to the file's metadata if captions contain them.",
    )
    masks: DatasetMasks | None = Field(default=None, description="None to train on whole images.")
    is_regularisation: bool = Field(
        default=False, description="Train on the base model's prediction for its images (prior preservation)."
    )


class TrainingSet(StageModel):
    """Value of the training_set asset: the datasets of a project, joined."""

    datasets: tuple[TrainingDataset, ...]
    fingerprints: dict[str, str] = Field(
        description="Names, sizes and times of the files that each dataset was read from, as a digest, by dataset asset key."
    )
    data_versions: dict[str, str] = Field(description="Of the datasets' assets, by asset key.")


class ValidationPrompt(StageModel):
    """A validation prompt, sampled during training and in the evaluation's gallery."""

    name: str = Field(description="Short name for files and plots.")
    prompt: str
    negative_prompt: str = ""


class TrainSpec(StageModel):
    """Input of `sdxl_pipeline.stages.train`. Its identity (`run_identity.run_identity`) identifies the run."""

    base_model: ResolvedModel
    hardware: Hardware
    settings: TrainingSettings = Field(
        description="Effective settings: run config, config.json, profile and defaults merged."
    )
    datasets: tuple[TrainingDataset, ...]
    prompts: tuple[ValidationPrompt, ...]
    run_dir: str = Field(
        description="Run folder of this identity: checkpoints, weights, metrics, validation images."
    )
    project: str


class TrainingPlan(StageModel):
    """Value of the training_plan asset: steps, epochs and repeats, from the crop plans."""

    steps: int
    batches_per_epoch: int = Field(description="Of all processes together, in the first epoch.")
    images_per_epoch: int = Field(description="Appearances of images in the first epoch.")
    trained_images: dict[str, int] = Field(description="By dataset.")
    held_out_images: dict[str, int] = Field(description="By dataset, including eval datasets.")
    appearances: dict[str, tuple[int, int]] = Field(
        description="(fewest, most) appearances of an image in the first epoch, by dataset."
    )
    raised_repeats: dict[str, int]


class ValidationImage(StageModel):
    """One image sampled during training."""

    step: int
    name: str
    prompt: str
    path: str
    seed: int
    scale: float = Field(default=1.0, description="Scale of the adapter.")


class Ancestor(StageModel):
    """The run and checkpoint that another run was warm-started from."""

    identity: str
    step: int
    same_trajectory: bool = Field(
        description="Whether the runs differ only in length, so that the weights equal those of an uninterrupted run."
    )
    takes_optimizer: bool = Field(description="Whether the optimizer's state was imported with the weights.")


class RunLineage(StageModel):
    """lineage.json in a run's folder. The aliases are the names in files of earlier versions."""

    identity: str
    trajectory: str = Field(
        description="Digest of everything that affects a step, without the number of steps."
    )
    any_length: str = Field(
        validation_alias=AliasChoices("any_length", "family"),
        description="Digest of everything but the length, even where a step depends on it.",
    )
    any_length_or_world_size: str | None = Field(
        None,
        validation_alias=AliasChoices("any_length_or_world_size", "kin"),
        description="Digest of everything but the length and the world size; None in files of earlier versions.",
    )
    early_stopping: str | None = Field(
        None, description="Digest of all that decides where early stopping ends the run; None without it."
    )
    optimizer: str
    ancestor: Ancestor | None


WeightsKind = Literal["lora", "unet"]
"""Result of a training: an adapter file, or the folder of a full UNet."""

KIND_LABELS: Final[Mapping[WeightsKind, str]] = {"lora": "LoRA", "unet": "trained UNet"}
"""Display names."""


EMA_FOLDER = "ema"
"""Folder beside the trained weights with their exponential moving average, under the same file name."""


class CheckpointWeights(StageModel):
    """The published weights of one step of a run, which the evaluation can select."""

    step: int
    epochs: float
    samples: int = Field(description="Images trained on, counting repeats.")
    weights: Literal["trained", "ema"]
    path: str = Field(description="File in diffusers' format, or the folder of a UNet.")
    sha256: str = Field(description="As TrainedLora.weights_sha256.")
    is_final: bool = Field(description="Whether these are the weights at the end of the run.")

    @property
    def name(self) -> str:
        """Return the value of `released_checkpoint` that selects this step."""
        return f"step-{self.step}"


class EarlyStop(StageModel):
    """Why a run ended before its planned steps."""

    step: int = Field(description="Step of the eval loss that stopped the run.")
    best_step: int
    best_loss: float = Field(description="Mean eval loss at best_step.")
    patience: int


class SettingDifference(StageModel):
    """A setting whose used value differs from the configuration, both values as text with their source."""

    setting: str
    configured: str
    used: str


class TrainedLora(StageModel):
    """Output of `train`; for `model_type: full` a trained UNet."""

    identity: str
    run_dir: str
    weights_kind: WeightsKind = "lora"
    weights_path: str = Field(
        description="pytorch_lora_weights.safetensors in diffusers' format, or the folder `unet`."
    )
    weights_sha256: str = Field(description="Of the file, or of the folder's file names and contents.")
    released_weights: Literal["trained", "ema"] = Field(
        default="trained",
        description="Which weights weights_path contains: as trained, or their EMA; run_dir has both with use_ema.",
    )
    kohya_path: str | None = Field(
        default=None,
        description="<project>.safetensors with kohya's key names beside weights_path; None for a UNet, or if it cannot be written.",
    )
    kohya_sha256: str | None = Field(default=None, description="Of that file.")
    kohya_dtype: str | None = Field(
        default=None, description="Dtype of its tensors: float16, bfloat16 or float32."
    )
    dora_approximation: dict[str, int | float] | None = Field(
        default=None,
        description="For weight-decomposed adapters, whose kohya file is a plain LoRA: its rank and relative_error (Frobenius).",
    )
    steps: int
    planned_steps: int | None = Field(
        default=None, description="Steps that the settings give; None in manifests of earlier versions."
    )
    stopped_early: EarlyStop | None = Field(
        default=None, description="Where early stopping ended the run; None if it took all planned steps."
    )
    epochs: float = Field(description="Epochs over the training images.")
    samples: int = Field(description="Images trained on, counting repeats.")
    trained_images: dict[str, int] = Field(
        default={}, description="Images trained on, by dataset, including regularisation datasets."
    )
    held_out_images: dict[str, int] = Field(
        default={}, description="Images held out from training for the eval loss, by dataset."
    )
    images_per_epoch: dict[str, float] = Field(
        default={}, description="Appearances of images in an epoch, by dataset."
    )
    appearances: dict[str, tuple[int, int]] = Field(
        default={}, description="(fewest, most) appearances of an image in the first epoch, by dataset."
    )
    crops_per_image: dict[str, float] = Field(
        default={}, description="Mean number of alternating crops per image, by dataset."
    )
    raised_repeats: dict[str, int] = Field(
        default={}, description="Repeats as raised by allow_dataset_oversubscription, by dataset."
    )
    resumed_from_step: int | None = Field(
        description="Step of the checkpoint that was resumed; None for a run from step 0."
    )
    ancestor: Ancestor | None = Field(
        default=None, description="The run it was warm-started from; None for a run from step 0."
    )
    reused: bool = Field(
        description="True when a finished run of this identity was found and nothing was trained."
    )
    overrides: tuple[SettingDifference, ...] = Field(
        default=(),
        description="Overrides of the launching run that make these weights differ from config.json; set by the asset.",
    )
    skipped_steps: int = Field(
        default=0, description="Steps skipped because their loss or gradients were not finite."
    )
    final_loss: float = Field(description="Mean training loss over the last tenth of the steps.")
    eval_losses: tuple[tuple[int, float], ...] = Field(
        default=(), description="(step, eval loss) measured during training; step 0 is the base model."
    )
    seconds: float
    steps_per_second: float | None
    peak_memory_bytes: int = Field(description="Peak memory of the main process, measured.")
    memory_estimate: dict[str, int] = Field(
        default={}, description="Estimated bytes by purpose, from before the first step."
    )
    estimated_memory_bytes: int | None = Field(default=None, description="Estimated peak of these bytes.")
    trainable_parameters: int
    adapted_modules: int = Field(description="Layers with an adapter, or trained layers of a UNet.")
    metrics_path: str = Field(description="metrics.jsonl, one line per logged step.")
    loss_curve_path: str = Field(description="PNG.")
    validation_sheet_path: str | None = Field(description="PNG: prompts down, steps across.")
    validation_images: tuple[ValidationImage, ...]
