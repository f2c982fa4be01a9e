"""How the settings of a run differ from those that config.json describes."""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import dagster as dg

from assets.event_log import USER_ERRORS
from resources.hardware import HardwareProfile
from sdxl_pipeline.config.loader import Project
from sdxl_pipeline.config.resolve import resolve_hardware, resolve_settings
from sdxl_pipeline.models.adapters.init_adapter_source import resolve_init_lora
from sdxl_pipeline.runtime.specs import SettingDifference, TrainSpec
from sdxl_pipeline.training.checkpoint.run_identity import (
    change_affects_weights,
    run_identity,
    setting_changes,
)


@dataclass(frozen=True)
class RunDifferences:
    """The differences between the spec of a run and the project's configuration."""

    project: Project
    spec: TrainSpec

    @cached_property
    def configured(self) -> TrainSpec:
        """Return the spec that config.json describes, on the hardware profile that this process's environment selects."""
        settings, hardware = self.project.training, self.spec.hardware
        # If the configuration cannot be resolved, every resolved value counts as a difference from it.
        with suppress(*USER_ERRORS, dg.Failure):
            profile = HardwareProfile().hardware()
            settings, _ = resolve_settings(settings, profile, {}, self.project.folder)
            settings = resolve_init_lora(settings, self.project.folder)
            hardware = resolve_hardware(settings, profile)
        return self.spec.model_copy(update={"settings": settings, "hardware": hardware})

    @cached_property
    def by_name(self) -> dict[str, SettingDifference]:
        """Return the settings that differ from the configured ones, by name."""
        return {
            key: SettingDifference(setting=key, configured=json.dumps(before), used=json.dumps(after))
            for key, (before, after) in setting_changes(self.configured, self.spec).items()
        }

    @cached_property
    def overrides(self) -> tuple[SettingDifference, ...]:
        """Return those that change the weights."""
        selecting = ("resume_from_checkpoint", *(["released_weights"] if self.spec.settings.use_ema else []))
        decisive = [key for key in self.by_name if change_affects_weights(key) or key in selecting]
        if decisive and set(decisive) <= {"init_lora", "resume_from_checkpoint"}:
            # Two paths may point to one file, and resuming from a checkpoint of the same trajectory gives the same weights.
            with suppress(*USER_ERRORS):
                if run_identity(self.configured) == run_identity(self.spec):
                    return ()
        return tuple(self.by_name[key] for key in decisive)
