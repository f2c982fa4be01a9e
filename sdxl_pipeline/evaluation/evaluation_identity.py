"""Identity of an evaluation: the digest of everything that its metrics and images depend on. Imports no torch."""

from pathlib import Path
from typing import Final

from sdxl_pipeline.config.schema.key_facts import keys_used_by
from sdxl_pipeline.config.schema.training import TrainingSettings
from sdxl_pipeline.evaluation.scoring_model import scoring_model_name, similarity_model_name
from sdxl_pipeline.files.atomic_files import sha256_path
from sdxl_pipeline.files.digest import digest_json
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import UserError
from sdxl_pipeline.training.data.samples import load_samples
from sdxl_pipeline.training.validation.eval_samples import select_eval_samples, select_probe_samples

CODE_VERSION = 5
"""To be increased with every change of the evaluation that changes its metrics or images."""

EVALUATION_KEYS: Final = keys_used_by(TrainingSettings, "evaluation")
"""Settings of the evaluation alone; they may change after the training."""

RUN_EVALUATION_KEYS: Final = keys_used_by(TrainingSettings, "run_evaluation")
"""Training settings that the evaluation's metrics and images also depend on."""


class ChangedWeightsError(UserError):
    """The weights of a checkpoint are missing, or not those that the training wrote."""


def evaluation_identity(spec: EvaluateSpec) -> str:
    """Return a hex SHA-256: equal identities mean equal reports, except for the comparison with the previous release.

    Raises ChangedWeightsError when the file of the final weights is missing or differs from what the training wrote.
    """
    candidates = candidates_of(spec)
    require_weights(candidates[-1])
    settings = spec.settings
    source, samples = select_eval_samples(spec.datasets, settings, settings.micro_conditioning)
    probe = select_probe_samples(spec.datasets, settings)
    training = (
        load_samples(spec.datasets, "train", settings.micro_conditioning).digest()
        if settings.num_caption_samples
        else None
    )
    return digest_json(
        {
            "code_version": CODE_VERSION,
            "base_model": spec.base_model.digest,
            "lora": spec.lora.weights_sha256,
            "checkpoints": [[each.step, each.weights, each.sha256] for each in candidates],
            "eval_losses": spec.lora.eval_losses,
            "pictures": [source, samples.digest(), probe.digest(), training],
            "prompts": [prompt.model_dump() for prompt in spec.prompts],
            "settings": settings.model_dump(mode="json", include=EVALUATION_KEYS | RUN_EVALUATION_KEYS),
            "scoring_models": [
                scoring_model_name(settings, spec.base_model),
                similarity_model_name(settings, spec.base_model),
            ],
            "device": spec.hardware.device,
        }
    )


def candidates_of(spec: EvaluateSpec) -> tuple[CheckpointWeights, ...]:
    """Return the weights to evaluate, by step, with the final ones last."""
    lora = spec.lora
    return spec.checkpoints or (
        CheckpointWeights(
            step=lora.steps,
            epochs=lora.epochs,
            samples=lora.samples,
            weights=lora.released_weights,
            path=lora.weights_path,
            sha256=lora.weights_sha256,
            is_final=True,
        ),
    )


def require_weights(weights: CheckpointWeights) -> None:
    """Raise ChangedWeightsError unless the file or folder is what the training wrote."""
    path = Path(weights.path)
    if not path.exists():
        raise ChangedWeightsError(f"{path} does not exist. Materialize lora again")
    if sha256_path(path) != weights.sha256:
        raise ChangedWeightsError(
            f"{path} is not the file that the training wrote: its SHA-256 differs. Materialize lora again"
        )
