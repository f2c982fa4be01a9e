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
from sdxl_pipeline.config.schema.key_facts import keys_with
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


OBJECTIVE_SECTIONS: Final = (ObjectiveSettings, NoiseSettings, ScheduledSamplingSettings)
"""The sections that define the training objective."""


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
        fields = {key: field for section in OBJECTIVE_SECTIONS for key, field in section.model_fields.items()}
        return {
            key: getattr(self, key) for key, field in fields.items() if getattr(self, key) != field.default
        }


PROFILE_KEYS: Final = keys_with(TrainingSettings, lambda key: key.profile)
"""Keys that the hardware profile sets where config.json does not; the fields of `Hardware` have the same names."""

LENGTH_KEYS: Final = keys_with(TrainingSettings, lambda key: key.length)
"""Keys of which one sets the length of the run."""
