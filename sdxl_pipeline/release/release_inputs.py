"""What a release is made of, and how its weights and its base model are described in texts. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.models.base_model import ResolvedModel
from sdxl_pipeline.release.sanitize import portable_name
from sdxl_pipeline.runtime.specs import KIND_LABELS, EvaluationReport, TrainedLora, ValidationPrompt

_ALGORITHMS = {"lokr": "LoKr", "loha": "LoHa", "lora": "LoRA", "locon": "LoCon"}


class ExportError(Exception):
    """Weights that their users could not use; the message describes why."""


@dataclass(frozen=True)
class ReleaseInputs:
    """Everything that a release is made of."""

    project: str
    base_model: ResolvedModel
    settings: TrainingSettings
    """The settings of the training run."""
    lora: TrainedLora
    report: EvaluationReport
    prompts: Sequence[ValidationPrompt]
    trigger_words: Sequence[str]
    lineage: Mapping[str, Any]
    """Plain data, written to lineage.json without local paths."""

    @property
    def is_lycoris(self) -> bool:
        """Whether the weights are a LyCORIS adapter."""
        return self.lora.weights_kind == "lora" and self.settings.lora_type == "lycoris"

    @property
    def base_model_name(self) -> str:
        """The base model's name without local folders."""
        return portable_name(self.base_model.source)

    @property
    def description(self) -> str:
        """One sentence on what the weights are, without markup."""
        is_adapter = self.lora.weights_kind == "lora"
        what = adapter_name(self.settings) if is_adapter else f"a {KIND_LABELS['unet']}"
        return f"{self.project}: {what} for {self.base_model_name}, {self.lora.steps:,} steps."


def adapter_name(settings: TrainingSettings) -> str:
    """Return the kind of adapter with its article, such as "a DoRA of rank 16" or "a LoKr (LyCORIS)"."""
    if settings.lora_type == "lycoris":
        algorithms = sorted(
            settings.lycoris.algorithms, key=lambda algo: (algo != settings.lycoris.algo, algo)
        )
        return f"a {' and '.join(_ALGORITHMS[algo] for algo in algorithms)} (LyCORIS)"
    return f"a {'DoRA' if settings.use_dora else 'LoRA'} of rank {settings.lora_rank}"


def hub_id(base_model: ResolvedModel) -> str | None:
    """Return the base model's id on the Hub; None for a local or bundled model."""
    return base_model.source if base_model.revision is not None else None
