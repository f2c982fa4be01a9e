"""Stage: evaluate trained weights against their base model.

    python -m sdxl_pipeline.stages.evaluate spec.json

The report of an evaluation with the same identity is reused if its images exist; torch is not imported then.
"""

from pathlib import Path
from typing import Final

from sdxl_pipeline.evaluation.evaluation_identity import (
    ChangedWeightsError,
    evaluation_identity,
    require_weights,
)
from sdxl_pipeline.files.atomic_files import remove_unfinished
from sdxl_pipeline.runtime.evaluation_report import EvaluateSpec, EvaluationReport
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.stage_runner import StopSignal, read_finished, run_stage, write_finished
from sdxl_pipeline.runtime.store_leases import leased_datasets

FOLDER_LENGTH: Final = 16
"""Characters of an evaluation's identity that name its folder in `output_dir`."""


def main(spec: EvaluateSpec, reporter: Reporter, stop: StopSignal) -> EvaluationReport:
    """Return the report of an existing evaluation with the same identity, or evaluate."""
    remove_unfinished(Path(spec.output_dir))
    identity = evaluation_identity(spec)
    folder = Path(spec.output_dir) / identity[:FOLDER_LENGTH]
    report_path = folder / "report.json"
    finished = read_finished(report_path, EvaluationReport, identity)
    if finished is not None and _is_complete(finished, reporter):
        reporter.log(f"Nothing to evaluate: the report {identity[:12]} exists with all its images.")
        return finished.model_copy(update={"reused": True})

    from sdxl_pipeline.evaluation.evaluator import evaluate

    with leased_datasets(spec.datasets, "evaluate"):
        report = evaluate(spec, identity, folder, reporter, stop)
    write_finished(report_path, report)
    return report


def _is_complete(report: EvaluationReport, reporter: Reporter) -> bool:
    """Return whether the images of a finished report exist and the selected weights are unchanged."""
    if report.selected_weights is not None:
        try:
            require_weights(report.selected_weights)
        except ChangedWeightsError as error:
            reporter.log(f"Evaluating again: {error}.")
            return False
    return all(Path(image.path).is_file() for image in report.images)


if __name__ == "__main__":
    run_stage(EvaluateSpec, main)
