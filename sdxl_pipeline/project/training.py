"""The settings of `config.json`: names and meanings follow SimpleTuner's, each described where it stands.

A hardware profile may set the keys of `PROFILE_KEYS`; `None` there means that the file leaves them to the profile. Keys written with
leading dashes or under another spelling are brought to these names before they reach the model (`sdxl_pipeline.project.keys`).
"""

from typing import Any, Final

from sdxl_pipeline.project.sections.adapter import AdapterSettings
from sdxl_pipeline.project.sections.automation import AutomationSettings
from sdxl_pipeline.project.sections.checkpoints import CheckpointSettings
from sdxl_pipeline.project.sections.data import DataSettings
from sdxl_pipeline.project.sections.ema import EmaSettings
from sdxl_pipeline.project.sections.evaluation import EvaluationSettings
from sdxl_pipeline.project.sections.masks import MaskSettings
from sdxl_pipeline.project.sections.memory import MemorySettings
from sdxl_pipeline.project.sections.model import ModelSettings
from sdxl_pipeline.project.sections.noise import NoiseSettings, ScheduledSamplingSettings
from sdxl_pipeline.project.sections.objective import ObjectiveSettings
from sdxl_pipeline.project.sections.optimisation import OptimisationSettings
from sdxl_pipeline.project.sections.release import ReleaseSettings
from sdxl_pipeline.project.sections.sharding import ShardingSettings
from sdxl_pipeline.project.sections.tracking import TrackingSettings
from sdxl_pipeline.project.sections.validation import ValidationSettings
from sdxl_pipeline.project.settings_model import SettingsModel

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
    OptimisationSettings,
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
    OptimisationSettings,
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
