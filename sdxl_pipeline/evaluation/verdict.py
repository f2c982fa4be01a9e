"""The verdict on a checkpoint: what its evaluation says for and against a release. Imports no torch."""

from collections.abc import Iterable, Sequence
from typing import Final, Literal, NamedTuple

from sdxl_pipeline.evaluation.report import describe_difference
from sdxl_pipeline.runtime.evaluation_report import EvaluationReport

MIN_EVAL_IMAGES: Final = 4
"""With fewer held-out images no statement on over-fitting is made."""

State = Literal["good", "warning", "bad", "unknown"]


class Finding(NamedTuple):
    """One line of the verdict."""

    state: State
    title: str
    text: str


def selected_step(report: EvaluationReport) -> int:
    """Return the step of the selected checkpoint; that of the newest image in reports without a selection."""
    if report.selected is not None:
        return report.selected.step
    return report.step or max((image.step for image in report.images), default=0)


def findings(report: EvaluationReport) -> list[Finding]:
    """Return what the report says for and against a release, the most serious first."""
    rank: list[State] = ["bad", "warning", "unknown", "good"]
    found = [*_loss_findings(report), *_image_findings(report)]
    return sorted(found, key=lambda finding: rank.index(finding.state))


def headline(verdict: Sequence[Finding], step: int) -> dict[str, str]:
    """Return the verdict's sentence and its state, which is that of the most serious finding."""
    state = verdict[0].state if verdict else "unknown"
    texts: dict[State, str] = {
        "good": f"Step {step} is better than the base model",
        "warning": f"Step {step} can be released, with reservations",
        "bad": f"Step {step} should not be released",
        "unknown": f"Step {step} cannot be evaluated completely",
    }
    return {"state": state, "text": texts[state]}


def _loss_findings(report: EvaluationReport) -> Iterable[Finding]:
    difference = report.difference_to_base
    if difference is None or not difference.images:
        yield Finding("unknown", "Not compared with the base model", "The eval loss was not measured.")
    else:
        better = difference.is_lower
        yield Finding(
            "good" if better else "bad",
            "Better than the base model" if better else "Not measurably better than the base model",
            f"Eval loss {describe_difference(difference)}.",
        )
    if report.overfitting is not None:
        late = report.overfitting.from_step
        over = late is not None and selected_step(report) >= late
        state: State = "warning" if over else "good" if report.overfitting.conclusive else "unknown"
        title = "Over-fitted" if over else "Not over-fitted" if state == "good" else "Over-fitting unknown"
        yield Finding(state, title, report.overfitting.text)
    elif report.eval_source == "training images" or report.eval_images < MIN_EVAL_IMAGES:
        yield Finding(
            "unknown",
            "Over-fitting unknown",
            f"The eval loss was measured on {report.eval_images} images ({report.eval_source}); at least {MIN_EVAL_IMAGES} held-out images are needed.",
        )
    if report.difference_to_release is not None and report.difference_to_release.images:
        worse = report.difference_to_release.is_higher
        yield Finding(
            "warning" if worse else "good",
            "Worse than the last release" if worse else "Not worse than the last release",
            f"Eval loss {describe_difference(report.difference_to_release)}.",
        )


def _image_findings(report: EvaluationReport) -> Iterable[Finding]:
    if report.broken_images:
        details = "; ".join(f"{item.name}: {item.reason}" for item in report.broken_images)
        yield Finding("bad", "Broken images", details)
    if (memorised := report.memorisation) is not None:
        over = memorised.is_over_limit
        yield Finding(
            "bad" if over else "good",
            "Training images are memorised" if over else "Not memorised",
            memorised.text,
        )
    if report.selected is not None and report.selected.vetoed:
        reasons = "; ".join(f"step {veto.step}: {veto.reason}" for veto in report.selected.vetoes)
        yield Finding("bad", "Every checkpoint was refused", reasons)
