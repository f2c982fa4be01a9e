"""Identity of an evaluation: the digest of everything that its metrics and images depend on. Imports no torch."""

from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.scoring_model import scoring_model_name
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.specs import EvaluateSpec, TrainedLora
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples

CODE_VERSION = 3
"""To be increased with every change of the evaluation that changes its metrics or images."""

EVALUATION_KEYS: Final = keys_used_by(TrainingSettings, "evaluation")
"""Settings of the evaluation alone; they may change after the training."""

RUN_EVALUATION_KEYS: Final = keys_used_by(TrainingSettings, "run_evaluation")
"""Training settings that the evaluation's metrics and images also depend on."""


def evaluation_identity(spec: EvaluateSpec) -> str:
    """Return a hex SHA-256: equal identities mean equal reports, except for the comparison with the previous release.

    Raises UserError when the weights file is missing or differs from what the training wrote.
    """
    _require_weights(spec.lora)
    source, samples = select_eval_samples(spec.datasets, spec.settings, spec.settings.micro_conditioning)
    return digest_json(
        {
            "code_version": CODE_VERSION,
            "base_model": spec.base_model.digest,
            "lora": spec.lora.weights_sha256,
            "pictures": [source, samples.digest()],
            "prompts": [prompt.model_dump() for prompt in spec.prompts],
            "settings": spec.settings.model_dump(mode="json", include=EVALUATION_KEYS | RUN_EVALUATION_KEYS),
            "scoring_model": scoring_model_name(spec.settings, spec.base_model),
            "device": spec.hardware.device,
        }
    )


def _require_weights(lora: TrainedLora) -> None:
    weights = Path(lora.weights_path)
    if not weights.exists():
        raise UserError(f"{weights} does not exist. Materialize lora again")
    if sha256_path(weights) != lora.weights_sha256:
        raise UserError(
            f"{weights} is not the file that the training wrote: its SHA-256 differs. Materialize lora again"
        )
