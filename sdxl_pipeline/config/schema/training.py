"""The settings of `config.json`: names and meanings follow SimpleTuner's, each described where it stands.

A hardware profile may set the keys of `PROFILE_KEYS`; `None` there means that the file leaves them to the profile. Keys written with
leading dashes or under another spelling are brought to these names before they reach the model (`sdxl_pipeline.config.settings_parser`).
"""

from typing import Any, Final

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.automation import AutomationSettings
from sdxl_pipeline.config.schema.checkpoints import CheckpointSettings
from sdxl_pipeline.config.schema.data import DataSettings
from sdxl_pipeline.config.schema.ema import EmaSettings
from sdxl_pipeline.config.schema.evaluation import EvaluationSettings
from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.config.schema.memory import MemorySettings
from sdxl_pipeline.config.schema.model import ModelSettings
from sdxl_pipeline.config.schema.noise import NoiseSettings, ScheduledSamplingSettings
from sdxl_pipeline.config.schema.objective import ObjectiveSettings
from sdxl_pipeline.config.schema.optimization import OptimizationSettings
from sdxl_pipeline.config.schema.release import ReleaseSettings
from sdxl_pipeline.config.schema.settings_model import SettingsModel
from sdxl_pipeline.config.schema.sharding import ShardingSettings
from sdxl_pipeline.config.schema.tracking import TrackingSettings
from sdxl_pipeline.config.schema.validation import ValidationSettings

PROFILE_KEYS: Final = (
    "mixed_precision",
    "gradient_checkpointing",
    "attention_mechanism",
    "base_model_precision",
    "text_encoder_1_precision",
    "text_encoder_2_precision",
    "vae_dtype",
    "vae_batch_size",
    "text_encoder_batch_size",
)
"""Keys a hardware profile sets when the user's file does not."""

SECTIONS: Final[tuple[type[SettingsModel], ...]] = (
    ModelSettings,
    AdapterSettings,
    OptimizationSettings,
    EmaSettings,
    ObjectiveSettings,
    NoiseSettings,
    ScheduledSamplingSettings,
    MaskSettings,
    MemorySettings,
    ShardingSettings,
    DataSettings,
    CheckpointSettings,
    ValidationSettings,
    EvaluationSettings,
    ReleaseSettings,
    TrackingSettings,
    AutomationSettings,
)
"""In the order in which a person reads them."""


class TrainingSettings(
    AutomationSettings,
    TrackingSettings,
    ReleaseSettings,
    EvaluationSettings,
    ValidationSettings,
    CheckpointSettings,
    DataSettings,
    ShardingSettings,
    MemorySettings,
    MaskSettings,
    ScheduledSamplingSettings,
    NoiseSettings,
    ObjectiveSettings,
    EmaSettings,
    OptimizationSettings,
    AdapterSettings,
    ModelSettings,
):
    """Every key of `config.json`, validated. Travels to the stages inside their specs.

    Pydantic collects the fields of the last base first, so the bases stand in the reverse of `SECTIONS`.
    """

    @property
    def effective_validation_seed(self) -> int:
        """`validation_seed`, or `seed` where it is not set."""
        return self.seed if self.validation_seed is None else self.validation_seed

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """What these settings change in the base model's scheduler_config.json, for training and for drawing alike."""
        keys = ("prediction_type", "rescale_betas_zero_snr")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @property
    def changed_objective(self) -> dict[str, Any]:
        """The settings of objective, noise and scheduled sampling that are not the defaults, by key."""
        sections = (ObjectiveSettings, NoiseSettings, ScheduledSamplingSettings)
        fields = {key: field for section in sections for key, field in section.model_fields.items()}
        return {
            key: getattr(self, key) for key, field in fields.items() if getattr(self, key) != field.default
        }
