"""What an evaluation is: the digest of everything that decides its figures and images. No torch."""

from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.scoring_model import scoring_model_name
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.specs import EvaluateSpec, TrainedLora
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.validation.eval_samples import choose_samples

CODE_VERSION = 3
"""Raise it when a change of the evaluation changes the numbers or images it gives."""

LOOKED_AT: Final = keys_used_by(TrainingSettings, "evaluation")
"""Settings that say how a LoRA is looked at; they may change after it was trained."""

TRAINED_WITH: Final = keys_used_by(TrainingSettings, "run_evaluation")
"""Settings of the training that the evaluation's figures and images depend on as well."""


def evaluation_identity(spec: EvaluateSpec) -> str:
    """Hex SHA-256: the same again means the same report, but for the comparison with the release before it.

    Raises UserError when the weights are not those that were trained.
    """
    _require_weights(spec.lora)
    source, samples = choose_samples(spec.datasets, spec.settings)
    return digest_json(
        {
            "code_version": CODE_VERSION,
            "base_model": spec.base_model.digest,
            "lora": spec.lora.weights_sha256,
            "pictures": [source, samples.digest()],
            "prompts": [prompt.model_dump() for prompt in spec.prompts],
            "settings": spec.settings.model_dump(mode="json", include=LOOKED_AT | TRAINED_WITH),
            "scoring_model": scoring_model_name(spec.settings, spec.base_model),
            "device": spec.hardware.device,
        }
    )


def _require_weights(lora: TrainedLora) -> None:
    weights = Path(lora.weights_path)
    if not weights.exists():
        raise UserError(f"{weights} is gone; materialize lora again")
    if sha256_path(weights) != lora.weights_sha256:
        raise UserError(
            f"{weights} is not what the training wrote: its SHA-256 differs. Materialize lora again"
        )
