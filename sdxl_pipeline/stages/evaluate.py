"""The evaluation as a program: `python -m sdxl_pipeline.stages.evaluate spec.json`.

The report of the same evaluation is reused when its pictures are still there; nothing heavy is imported then.
"""

from pathlib import Path

from pydantic import ValidationError

from sdxl_pipeline.evaluation.identity import evaluation_identity
from sdxl_pipeline.stages.program import StopSignal, run_stage
from sdxl_pipeline.stages.reporter import Reporter
from sdxl_pipeline.stages.specs import EvaluateSpec, EvaluationReport
from sdxl_pipeline.store.files import write_text_atomic

FINISHED = "finished.json"


def main(spec: EvaluateSpec, reporter: Reporter, stop: StopSignal) -> EvaluationReport:
    """Measure a LoRA against its base model, or find that it has been."""
    identity = evaluation_identity(spec)
    finished = finished_report(Path(spec.output_dir), identity)
    if finished is not None:
        reporter.log(f"Nothing to evaluate: the report {identity[:12]} is there with its pictures.")
        return finished.model_copy(update={"reused": True})

    from sdxl_pipeline.evaluation.evaluator import evaluate

    report = evaluate(spec, identity, reporter, stop)
    write_text_atomic(Path(spec.output_dir) / FINISHED, report.model_dump_json(indent=1))
    return report


def finished_report(output_dir: Path, identity: str) -> EvaluationReport | None:
    """The report of an evaluation of this identity whose files are all there; None when there is none."""
    try:
        report = EvaluationReport.model_validate_json((output_dir / FINISHED).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    files = [report.gallery_path, report.report_path, *(image.path for image in report.images)]
    if report.loss_plot_path is not None:
        files.append(report.loss_plot_path)
    if report.identity != identity or not all(Path(path).is_file() for path in files):
        return None
    return report


if __name__ == "__main__":
    run_stage(EvaluateSpec, main)
