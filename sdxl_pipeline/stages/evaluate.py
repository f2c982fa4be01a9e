"""The evaluation as a program: `python -m sdxl_pipeline.stages.evaluate spec.json`.

The report of the same evaluation is reused when its images are still there; nothing heavy is imported then.
"""

from pathlib import Path

from sdxl_pipeline.evaluation.evaluation_identity import evaluation_identity
from sdxl_pipeline.files.atomic_files import remove_unfinished
from sdxl_pipeline.runtime.reporter import Reporter
from sdxl_pipeline.runtime.specs import EvaluateSpec, EvaluationReport
from sdxl_pipeline.runtime.stage_runner import StopSignal, read_finished, run_stage, write_finished
from sdxl_pipeline.runtime.store_leases import leased_datasets


def main(spec: EvaluateSpec, reporter: Reporter, stop: StopSignal) -> EvaluationReport:
    """Measure a LoRA against its base model, or find that it has been."""
    remove_unfinished(Path(spec.output_dir))
    identity = evaluation_identity(spec)
    result = Path(spec.output_dir) / "report.json"
    finished = read_finished(result, EvaluationReport, identity)
    if finished is not None and all(Path(image.path).is_file() for image in finished.images):
        reporter.log(f"Nothing to evaluate: the report {identity[:12]} is there with its images.")
        return finished.model_copy(update={"reused": True})

    from sdxl_pipeline.evaluation.evaluator import evaluate

    with leased_datasets(spec.datasets, "evaluate"):
        report = evaluate(spec, identity, reporter, stop)
    write_finished(result, report)
    return report


if __name__ == "__main__":
    run_stage(EvaluateSpec, main)
