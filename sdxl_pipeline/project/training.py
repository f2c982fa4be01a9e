"""The settings of `config.json`: names and meanings follow SimpleTuner's, each described where it stands.

A hardware profile may set the keys of `PROFILE_KEYS`; `None` there means that the file leaves them to the profile. Keys written with
leading dashes or under another spelling are brought to these names before they reach the model (`sdxl_pipeline.project.keys`).
"""

import json
import math
import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from sdxl_pipeline.project.settings_model import BadValueError, SettingsModel

PROFILE_KEYS: Final = (
    "mixed_precision",
    "gradient_checkpointing",
    "attention_mechanism",
    "base_model_precision",
    "vae_dtype",
    "vae_batch_size",
    "text_encoder_batch_size",
)
"""Keys a hardware profile sets when the user's file does not."""

MODEL_FLAVOURS: Final = {"base-1.0": "stabilityai/stable-diffusion-xl-base-1.0"}
"""Hub repository of each `model_flavour`."""

ATTENTION_PROJECTIONS: Final = ("to_k", "to_q", "to_v", "to_out.0")
"""Suffixes of the UNet's attention projections."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
ResolutionType = Literal["area", "pixel_area", "pixel"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface"]
OptimizerValue = bool | float | str


class TrainingSettings(SettingsModel):
    """Every key of `config.json`, validated. Travels to the stages inside their specs."""

    # --- the model
    model_type: Literal["lora"] = Field("lora", description="What is trained: a LoRA on the UNet.")
    model_family: Literal["sdxl"] = Field("sdxl", description="This project trains Stable Diffusion XL.")
    model_flavour: Literal["base-1.0"] = Field(
        "base-1.0", description="Which released SDXL; base-1.0 is stabilityai/stable-diffusion-xl-base-1.0."
    )
    pretrained_model_name_or_path: str | None = Field(
        None,
        description="Hub id, diffusers folder, .safetensors checkpoint or bundled:tiny-sdxl; replaces model_flavour.",
    )
    pretrained_vae_model_name_or_path: str | None = Field(
        None, description="Hub id or folder of another VAE."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of the base model on the Hub.")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="What the UNet predicts; not set: what the base model's scheduler says."
    )

    # --- the adapter
    lora_type: Literal["standard"] = Field("standard", description="Adapter kind: PEFT's LoRA.")
    lora_rank: Count = Field(16, description="Rank of the update matrices.")
    lora_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Updates are scaled by lora_alpha / lora_rank; not set: equal to lora_rank."
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Probability of dropping an adapter's input."
    )
    lora_target_modules: tuple[str, ...] = Field(
        ATTENTION_PROJECTIONS,
        min_length=1,
        description="Name suffixes of the UNet layers that get an adapter: a list, or names joined by commas.",
    )

    # --- optimisation
    learning_rate: Annotated[float, Field(gt=0, le=10)] = Field(
        1e-4, description="Learning rate after warm-up."
    )
    optimizer: Literal["adamw", "optimi-adamw", "optimi-lion", "optimi-stableadamw"] = Field(
        "adamw", description="Optimizer; optimi-* need the extra `optimizers`."
    )
    optimizer_config: dict[str, OptimizerValue] = Field(
        default_factory=dict,
        description='The optimizer\'s own settings, as "beta1=0.9,weight_decay=0.01" or an object.',
    )
    lr_scheduler: Literal["constant", "constant_with_warmup", "cosine"] = Field(
        "constant_with_warmup", description="Shape of the learning rate over the run."
    )
    lr_warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps over which the learning rate rises from 0."
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        2.0, description="Gradients are scaled down to this norm; 0 leaves them alone."
    )
    train_batch_size: Count = Field(4, description="Pictures per device and forward pass.")
    gradient_accumulation_steps: Count = Field(1, description="Forward passes per optimizer step.")
    max_train_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Optimizer steps to train; 0 leaves the length to num_train_epochs."
    )
    num_train_epochs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Passes over the pictures; 0 leaves it to max_train_steps; 1 when neither is given."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="Seed of everything random.")

    # --- the objective
    snr_gamma: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Min-SNR loss weighting (Hang et al. 2023), 5 in the paper; 0 or not set: off."
    )
    caption_dropout_probability: Share = Field(
        0.0, description="Share of samples trained with the empty prompt; size conditioning is kept."
    )
    micro_conditioning: Literal["original", "resized"] = Field(
        "original",
        description="original_size of SDXL's size conditioning: the file's own size, or the size after resizing (SimpleTuner).",
    )

    # --- speed and memory (a hardware profile may set these)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="Precision of the UNet's passes."
    )
    gradient_checkpointing: bool | None = Field(
        None, description="Recompute activations in the backward pass: less memory, slower."
    )
    attention_mechanism: Literal["diffusers"] | None = Field(
        None, description="Attention kernel: diffusers is PyTorch's scaled_dot_product_attention."
    )
    base_model_precision: Literal["no_change", "int8-quanto"] | None = Field(
        None, description="Quantization of the frozen UNet; int8-quanto needs the extra `quantization`."
    )
    vae_dtype: Literal["bf16", "fp32"] | None = Field(None, description="Precision of VAE encoding.")
    vae_batch_size: Count | None = Field(None, description="Pictures per VAE forward pass.")
    text_encoder_batch_size: Count | None = Field(None, description="Captions per text-encoder forward pass.")

    # --- datasets: the file that lists them, and defaults for its entries
    data_backend_config: str = Field(
        "multidatabackend.json", min_length=1, description="The file that lists the datasets."
    )
    resolution: Annotated[float, Field(gt=0)] = Field(
        1024.0, description="Default of the datasets' resolution."
    )
    resolution_type: ResolutionType = Field(
        "pixel_area", description="Default of the datasets' resolution_type."
    )
    minimum_image_size: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Default of the datasets' minimum_image_size."
    )
    maximum_image_size: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default of the datasets' maximum_image_size."
    )
    target_downsample_size: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Default of the datasets' target_downsample_size."
    )
    max_upscale_threshold: Annotated[float, Field(ge=0)] | None = Field(
        None, description="Default of the datasets' max_upscale_threshold."
    )
    aspect_bucket_rounding: Annotated[int, Field(ge=1, le=9)] = Field(
        2, description="Decimals that aspect ratios are rounded to when buckets are chosen."
    )
    aspect_bucket_alignment: Annotated[int, Field(ge=8, multiple_of=8)] = Field(
        64, description="Bucket edges are multiples of this many pixels."
    )
    caption_strategy: CaptionStrategy = Field(
        "filename", description="Default of the datasets' caption_strategy."
    )
    instance_prompt: str | None = Field(None, description="Default of the datasets' instance_prompt.")
    prepend_instance_prompt: bool = Field(
        False, description="Default of the datasets' prepend_instance_prompt."
    )
    only_instance_prompt: bool = Field(False, description="Default of the datasets' only_instance_prompt.")
    skip_file_discovery: str = Field("", description="Default of the datasets' skip_file_discovery.")
    write_batch_size: Count = Field(128, description="Default of the text_embeds entries' write_batch_size.")
    vae_cache_ondemand: bool = Field(False, description="Default of the datasets' vae_cache_ondemand.")
    vae_cache_disable: bool = Field(False, description="Default of the datasets' vae_cache_disable.")
    vae_cache_clear_each_epoch: bool = Field(
        False, description="Default of the datasets' vae_cache_clear_each_epoch."
    )
    text_cache_ondemand: bool = Field(
        False, description="Default of the text_embeds entries' text_cache_ondemand."
    )
    text_cache_disable: bool = Field(
        False, description="Default of the text_embeds entries' text_cache_disable."
    )
    tokenizer_max_length: Literal[77, 154, 231] = Field(
        77,
        description="Tokens a caption may have before its tail is cut: 77 is the encoders' own window; 154 and 231 encode captions in two and three windows.",
    )
    allow_dataset_oversubscription: bool = Field(
        False,
        description="Raise the repeats of datasets that are too small for one step, instead of refusing.",
    )

    # --- checkpoints
    output_dir: str = Field(
        "output", min_length=1, description="Folder for runs, checkpoints and the finished LoRA."
    )
    checkpoint_step_interval: Annotated[int, Field(ge=0)] = Field(
        500, description="Steps between checkpoints; 0 writes only the one at the end."
    )
    checkpoints_total_limit: Count | None = Field(
        None, description="Checkpoints kept; the oldest goes first. Not set: all."
    )
    resume_from_checkpoint: Literal["latest"] | None = Field(
        "latest", description='"latest" continues an unfinished run of the same identity; none starts again.'
    )

    # --- validation pictures
    validation_disable: bool = Field(False, description="Draw no pictures during training.")
    validation_prompt: str | None = Field(
        None, description="Prompt drawn during training and in the evaluation."
    )
    user_prompt_library: str | None = Field(
        None,
        description='JSON file of more prompts: {"name": "prompt"} or {"name": {"prompt": ..., "negative_prompt": ...}}.',
    )
    validation_negative_prompt: str = Field(
        "blurry, cropped, ugly", description="Negative prompt of the validation pictures."
    )
    validation_resolution: str = Field(
        "1024x1024",
        description='Sizes of the validation pictures: "1024x1024,1280x768" (WxH), one edge, or megapixels when under 128.',
    )
    validation_guidance: Annotated[float, Field(ge=0)] = Field(
        7.5, description="Classifier-free guidance scale."
    )
    validation_guidance_rescale: Share = Field(
        0.0, description="Guidance rescale of Lin et al. 2023; 0 is off."
    )
    validation_num_inference_steps: Count = Field(30, description="Sampler steps per picture.")
    validation_seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="Seed of the validation pictures; not set: `seed`."
    )
    validation_step_interval: Annotated[int, Field(ge=0)] = Field(
        100, description="Steps between validation pictures; 0 draws them only at the end."
    )
    num_validation_images: Count = Field(1, description="Pictures per prompt, with successive seeds.")

    # --- evaluation
    evaluation_type: Literal["none", "clip"] = Field(
        "none", description="clip also scores the gallery with CLIP."
    )
    pretrained_evaluation_model_name_or_path: str = Field(
        "openai/clip-vit-large-patch14",
        min_length=1,
        description="CLIP that scores: Hub id, local folder or bundled:tiny-clip.",
    )
    eval_loss_disable: bool = Field(False, description="Leave the eval loss out.")
    eval_timesteps: Annotated[int, Field(ge=1, le=1000)] = Field(
        28, description="Timesteps the eval loss is averaged over."
    )
    num_eval_images: Count | None = Field(
        None, description="Most pictures used for the eval loss; not set: all."
    )
    eval_holdout_share: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.1,
        description="Share of each dataset kept out of training for the eval loss when no eval dataset is given.",
    )

    # --- release
    push_to_hub: bool = Field(False, description="Upload the release to the Hugging Face Hub.")
    hub_model_id: str | None = Field(
        None,
        pattern=r"^([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*$",
        description='Repository, "name" or "owner/name"; not set: the project\'s name.',
    )
    model_card_private: bool = Field(True, description="Create the repository as private.")
    model_card_note: str | None = Field(None, description="A note at the top of the model card.")

    # --- tracking
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        (), description='Trackers, joined by commas: tensorboard, wandb; "none" for none.'
    )
    tracker_project_name: str | None = Field(
        None, description="Project name in the trackers; not set: the project's name."
    )
    tracker_run_name: str | None = Field(
        None, description="Run name in the trackers; not set: the run's identity."
    )
    logging_dir: str = Field("logs", min_length=1, description="Folder of the tensorboard logs.")

    # --- automation
    retraining_cron: str | None = Field(
        None,
        pattern=r"^(@(hourly|daily|midnight|weekly|monthly|yearly|annually)|\S+( +\S+){4})$",
        description='When to train again, as cron ("0 3 * * 0" is Sundays at three); not set: never by itself.',
    )

    @property
    def text_windows(self) -> int:
        """Windows of 77 tokens that every caption is encoded in."""
        return self.tokenizer_max_length // 77

    @property
    def effective_lora_alpha(self) -> float:
        """`lora_alpha`, or the rank where it is not set."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def effective_validation_seed(self) -> int:
        """`validation_seed`, or `seed` where it is not set."""
        return self.seed if self.validation_seed is None else self.validation_seed

    @property
    def validation_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of each entry of `validation_resolution`."""
        return parse_sizes(self.validation_resolution)

    @field_validator("max_train_steps", "num_train_epochs", "snr_gamma", mode="before")
    @classmethod
    def _zero_is_not_set(cls, value: Any) -> Any:
        try:
            return None if not isinstance(value, bool) and float(value) == 0 else value
        except (TypeError, ValueError):
            return value

    @field_validator("lora_target_modules", "report_to", mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value.strip().startswith("["):
                try:
                    return json.loads(value)
                except json.JSONDecodeError as error:
                    raise BadValueError(
                        f"is not a list: {error.msg}", 'write ["to_k", "to_q"] or "to_k,to_q"'
                    ) from error
            return tuple(part.strip() for part in value.split(",") if part.strip() not in ("", "none"))
        return value

    @field_validator("optimizer_config", mode="before")
    @classmethod
    def _read_optimizer_config(cls, value: Any) -> Any:
        if isinstance(value, str):
            return parse_assignments(value)
        if isinstance(value, dict):
            return {key: _scalar(item) if isinstance(item, str) else item for key, item in value.items()}
        return value

    @field_validator("vae_dtype", mode="before")
    @classmethod
    def _default_vae_dtype(cls, value: Any) -> Any:
        return None if value == "default" else value

    @field_validator("caption_strategy", mode="before")
    @classmethod
    def _read_caption_strategy(cls, value: Any) -> Any:
        return "instanceprompt" if value == "instance_prompt" else value

    @field_validator("tokenizer_max_length", mode="before")
    @classmethod
    def _read_number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.strip().isdigit() else value

    @field_validator("validation_resolution", mode="before")
    @classmethod
    def _read_validation_resolution(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = f"{value:g}"
        if isinstance(value, str):
            parse_sizes(value)
        return value

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_train_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "num_train_epochs", 1)  # the model is frozen for everyone else
        return self


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """(height, width) in pixels of each part of `text`, such as "1024x1024,1280x768" (WxH), "768" (an edge) or "1.0" (megapixels).

    A bare number under 128 is megapixels of a square whose edge is rounded to a multiple of 64. Raises BadValueError for anything else,
    and for an edge that is not a multiple of 8, which the VAE could not decode to.
    """
    sizes = tuple(_parse_size(part.strip()) for part in text.split(","))
    for height, width in sizes:
        if height % 8 or width % 8 or min(height, width) < 8:
            near = "x".join(str(max(8, round(edge / 8) * 8)) for edge in (width, height))
            raise BadValueError(f"{width}x{height} is not a multiple of 8 on both edges", f"write {near}")
    return sizes


def _parse_size(part: str) -> tuple[int, int]:
    if match := re.fullmatch(r"(\d+)\s*[xX×]\s*(\d+)", part):
        return int(match[2]), int(match[1])
    try:
        number = float(part)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise BadValueError(
            f"{part!r} is not a size", 'write "1024x1024", "1024" or megapixels such as "1.0"'
        )
    edge = max(64, round(math.sqrt(number * 1e6) / 64) * 64) if number < 128 else int(number)
    return edge, edge


def parse_assignments(text: str) -> dict[str, OptimizerValue]:
    """`"beta1=0.9,weight_decay=0.01"` as a dict; numbers and booleans are typed. Raises BadValueError for a part without "="."""
    values: dict[str, OptimizerValue] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (name and equals and value):
            raise BadValueError(
                f"{part!r} is not of the form name=value", 'write for example "beta1=0.9,weight_decay=0.01"'
            )
        if name in values:
            raise BadValueError(f"{name!r} is given twice", "keep one of the two")
        values[name] = _scalar(value)
    return values


def _scalar(text: str) -> OptimizerValue:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text
