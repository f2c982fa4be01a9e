"""Records of earlier versions load, because every later field has a default."""

import pytest

from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport, HubRelease, Memorisation
from sdxl_pipeline.runtime.specs import StageModel, TrainedLora, ValidationImage
from sdxl_pipeline.training.logging.run_logs import EvalRow

REQUIRED = {
    TrainedLora: "identity run_dir weights_path weights_sha256 steps epochs samples resumed_from_step reused final_loss seconds "
    "steps_per_second peak_memory_bytes trainable_parameters adapted_modules metrics_path loss_curve_path validation_sheet_path "
    "validation_images",
    EvaluateSpec: "base_model hardware settings lora datasets prompts output_dir",
    EvaluationReport: "identity reused lora_sha256 eval_source eval_images base_loss lora_loss base_clip lora_clip gallery_path images "
    "broken_images loss_plot_path report_path change_since_release seconds",
    HubRelease: "folder files model_card_path pushed repo_id commit url lineage",
    ValidationImage: "step name prompt path seed",
    EvalRow: "step loss",
}
"""Fields without a default. A further one would make the stored values of assets and finished.json of existing projects unreadable."""


@pytest.mark.parametrize("model", REQUIRED, ids=lambda model: model.__name__)
def test_stored_records_require_no_further_fields(model: type[StageModel]):
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    assert required == {*REQUIRED[model].split()}


@pytest.mark.parametrize(
    ("samples", "flagged", "is_over"), [(0, 0, False), (10, 1, False), (10, 2, True), (1, 1, True)]
)
def test_memorisation_is_over_the_limit_above_its_share(samples, flagged, is_over):
    memorisation = Memorisation(
        samples=samples, flagged=flagged, limit=0.1, calibrated_on=0, pairs=(), sheet_path=None, text=""
    )
    assert memorisation.is_over_limit is is_over
