"""Selection of the checkpoint that is evaluated and published. Imports no torch.

The rule for "best" is that of one standard error (Breiman et al. 1984, for the pruning of trees): among the checkpoints whose held-out eval
loss is within one standard error of the lowest the earliest, which is the least over-fitted.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final, Literal

from sdxl_pipeline.evaluation.report import paired_difference
from sdxl_pipeline.runtime.evaluation_report import CheckpointLoss, LossSummary, Selection, Veto
from sdxl_pipeline.runtime.specs import CheckpointWeights
from sdxl_pipeline.runtime.stage_runner import UserError

MAX_STEPS: Final = 20
"""Steps whose checkpoints are evaluated. Each costs eval_timesteps forward passes per image, which for SDXL are minutes."""

MAX_LISTED: Final = 10


def limit_candidates(
    checkpoints: Sequence[CheckpointWeights],
    requested: str,
    limit: int = MAX_STEPS,
    best_step: int | None = None,
) -> tuple[list[CheckpointWeights], list[int]]:
    """Return the checkpoints of at most `limit` steps, evenly spaced from the last one backwards, and the steps that are left out.

    The requested step is never left out, nor is `best_step`, which has the lowest eval loss of a training that stopped early.
    """
    steps = sorted({each.step for each in checkpoints})
    chosen = set(steps)
    if len(steps) > limit:
        evenly = {steps[len(steps) - 1 - number * len(steps) // limit] for number in range(limit)}
        named = {each.step for each in checkpoints if each.name == requested or each.step == best_step}
        chosen = evenly | named
        for step in sorted(evenly - named)[: len(chosen) - limit]:
            chosen.discard(step)
    return [each for each in checkpoints if each.step in chosen], [
        step for step in steps if step not in chosen
    ]


def require_step(checkpoints: Sequence[CheckpointWeights], requested: str, weights: str) -> None:
    """Raise UserError if `requested` is a step without a checkpoint of `weights`."""
    existing = sorted({each.step for each in checkpoints if each.weights == weights})
    if requested in ("best", "last") or requested in {f"step-{step}" for step in existing}:
        return
    listed = ", ".join(f'"step-{step}"' for step in existing[-MAX_LISTED:])
    kind = "EMA weights" if weights == "ema" else "trained weights"
    raise UserError(
        f'config.json: released_checkpoint: "{requested}" has no checkpoint with {kind}. Write "best", "last", or one of: {listed}'
    )


def lowest_loss(losses: Mapping[int, LossSummary]) -> int:
    """Return the step of the lowest mean loss, the earliest of equal ones."""
    return min(losses, key=lambda step: (losses[step].mean, step))


def select(
    losses: Sequence[CheckpointLoss],
    steps: Collection[int],
    requested: str,
    weights: Literal["trained", "ema"],
    vetoes: Sequence[Veto] = (),
    similarities: Mapping[int, Sequence[float]] | None = None,
) -> Selection:
    """Return the selected one of `steps`, which have a checkpoint of `weights`.

    `losses` are all measured ones; those with `to_best` were compared on held-out images. `similarities` are those of each checkpoint's
    images to the training images, in one order: a later checkpoint within one standard error of the lowest loss is selected if its mean is
    higher by more than one standard error of the paired difference. A step with a veto is selected only if it is requested, or if every
    step has one.
    """
    refused = {veto.step for veto in vetoes}
    open_steps = sorted(set(steps) - refused)
    comparable = {
        loss.step: loss.held_out
        for loss in losses
        if loss.weights == weights and loss.to_best is not None and loss.step in steps
    }
    remaining = {step: loss for step, loss in comparable.items() if step not in refused} or comparable
    best_step = lowest_loss(remaining) if remaining else None
    within = within_one_error(remaining, best_step) if best_step is not None else ()
    if requested not in ("best", "last"):
        step, text = int(requested.removeprefix("step-")), "as released_checkpoint requests"
    elif requested == "last":
        step, text = max(steps), "the last one, as released_checkpoint requests"
    elif not comparable:
        step = max(open_steps or steps)
        text = "the last one, because there are no eval losses of held-out images to select by"
    elif not set(within) & set(open_steps):
        step, text = max(steps), "the last of those that were tried, because all of them were refused"
    else:
        assert best_step is not None
        step = _most_similar(within, similarities or {})
        text = _describe_rule(step, best_step, within, remaining)
    refusals = "".join(f" Step {veto.step} was refused: {veto.reason}." for veto in vetoes)
    return Selection(
        requested=requested,
        step=step,
        weights=weights,
        best_step=best_step,
        within_one_error=within,
        vetoes=tuple(vetoes),
        vetoed=step in refused,
        text=f"Step {step} is selected: {text}.{refusals}",
    )


def within_one_error(losses: Mapping[int, LossSummary], best_step: int) -> tuple[int, ...]:
    """Return the steps whose loss exceeds the lowest by at most one standard error of their paired difference over images."""
    best = dict(losses[best_step].by_image)
    found = []
    for step in sorted(losses):
        difference = paired_difference(losses[step], best)
        error = difference.standard_error
        if step == best_step or (error is not None and difference.mean <= error):
            found.append(step)
    return tuple(found)


def _most_similar(steps: Sequence[int], similarities: Mapping[int, Sequence[float]]) -> int:
    chosen = steps[0]
    for step in steps[1:]:
        if chosen in similarities and step in similarities:
            pairs = zip(similarities[step], similarities[chosen], strict=True)
            differences = [after - before for after, before in pairs]
            mean, count = sum(differences) / len(differences), len(differences)
            if count > 1:
                squares = sum((difference - mean) ** 2 for difference in differences)
                if mean > math.sqrt(squares / (count - 1) / count):
                    chosen = step
    return chosen


def _describe_rule(
    step: int, best_step: int, within: Sequence[int], losses: Mapping[int, LossSummary]
) -> str:
    lowest = f"the lowest held-out eval loss ({losses[best_step].mean:.5f})"
    if len(within) == 1:
        return (
            f"it has {lowest}, and no other checkpoint is within one standard error of it"
            if len(losses) > 1
            else f"it has {lowest}"
        )
    steps = ", ".join(map(str, within))
    which = (
        "the earliest"
        if step == within[0]
        else "whose images are more similar to the training images than those of earlier ones,"
    )
    return f"{which} of the steps {steps}, which are within one standard error of {lowest}, that of step {best_step}"
