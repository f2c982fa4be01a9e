"""The settings of `config.json`. Names and meanings follow SimpleTuner's; the fields of the sections describe them.

`PROFILE_KEYS` are None where the hardware profile gives the value. `sdxl_pipeline.config.settings_parser` maps keys with leading dashes
and aliases to these names.
"""

from typing import Any, Final

from sdxl_pipeline.config.schema.adapter import AdapterSettings
from sdxl_pipeline.config.schema.automation import AutomationSettings
from sdxl_pipeline.config.schema.checkpoints import CheckpointSettings
from sdxl_pipeline.config.schema.data import DataSettings
from sdxl_pipeline.config.schema.evaluation import EvaluationSettings
from sdxl_pipeline.config.schema.key_facts import keys_with
from sdxl_pipeline.config.schema.masks import MaskSettings
from sdxl_pipeline.config.schema.memory import MemorySettings, ShardingSettings
from sdxl_pipeline.config.schema.model import ModelSettings
from sdxl_pipeline.config.schema.objective import NoiseSettings, ObjectiveSettings, ScheduledSamplingSettings
from sdxl_pipeline.config.schema.optimization import EmaSettings, OptimizationSettings
from sdxl_pipeline.config.schema.release import ReleaseSettings
from sdxl_pipeline.config.schema.settings_model import SettingsModel
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
"""The sections in the order of docs/settings.md."""


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
    """Every key of `config.json`, validated. The specs pass it to the stages.

    Pydantic collects the fields of the last base first, so the bases are in the reverse order of `SECTIONS`.
    """

    @property
    def effective_validation_seed(self) -> int:
        """Return `validation_seed`, or `seed` if it is not set."""
        return self.seed if self.validation_seed is None else self.validation_seed

    @property
    def scheduler_changes(self) -> dict[str, Any]:
        """Return the entries of the base model's scheduler_config.json that these settings replace, for training and inference."""
        keys = ("prediction_type", "rescale_betas_zero_snr")
        return {key: getattr(self, key) for key in keys if getattr(self, key) is not None}

    @property
    def changed_objective(self) -> dict[str, Any]:
        """Return the settings of objective, noise and scheduled sampling that differ from their defaults, by key."""
        fields = {key: field for section in OBJECTIVE_SECTIONS for key, field in section.model_fields.items()}
        return {
            key: getattr(self, key) for key, field in fields.items() if getattr(self, key) != field.default
        }


PROFILE_KEYS: Final = keys_with(TrainingSettings, lambda key: key.profile)
"""Keys that the hardware profile sets where config.json does not; the fields of `Hardware` have the same names."""

LENGTH_KEYS: Final = keys_with(TrainingSettings, lambda key: key.length)
"""Keys of which one sets the length of the run."""
