"""The loss curve of a run, and those of two runs together, as PNGs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.training.logging.run_logs import StepMetrics

LOSS_COLOR = "#1f5fa8"
EVAL_COLOR = "#2d8a4e"
LR_COLOR = "#c8553d"
NORM_COLOR = "#6b6b6b"
MAX_RATIO_ON_ONE_AXIS = 4.0
"""Training and eval losses share an axis unless one is more than this many times the other."""

SMOOTHING_FRACTION = 0.05
"""Span of the exponential averages, as a fraction of the run."""


def plot_loss_curve(
    rows: Sequence[StepMetrics],
    path: Path,
    title: str,
    eval_losses: Sequence[tuple[int, float]] = (),
) -> None:
    """Write a PNG to `path`: the loss over steps with the eval losses (step, loss), and below it gradient norm and learning rate.

    The loss of each step is faint, its exponential average strong. `rows` must not be empty.
    """
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, lower_axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _plot_losses(loss_axes, rows, eval_losses)
    loss_axes.set_title(title, loc="left")
    _plot_grad_norms(lower_axes, rows)
    _plot_learning_rate(lower_axes.twinx(), rows)
    lower_axes.set_xlabel("step")
    lower_axes.set_xlim(0, max(rows[-1].step, *(step for step, _ in eval_losses), 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


@dataclass(frozen=True)
class RunCurves:
    """The losses of a run by step, and its name in the legend."""

    name: str
    rows: Sequence[StepMetrics]
    eval_losses: Sequence[tuple[int, float]]


def plot_runs(first: RunCurves, second: RunCurves, path: Path) -> None:
    """Write a PNG to `path`: the averaged training losses of two runs by step, and below them their eval losses, if any were measured."""
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    measured = bool(first.eval_losses or second.eval_losses)
    axes = figure.subplots(1 + measured, 1, sharex=True, squeeze=False)[:, 0]
    for run, color in ((first, LOSS_COLOR), (second, LR_COLOR)):
        steps, losses = [row.step for row in run.rows], pd.Series([row.loss for row in run.rows], dtype=float)
        average = losses.ewm(span=_ewm_span(run.rows)).mean()
        axes[0].plot(steps, average, color=color, linewidth=2, marker=_marker(run.rows), label=run.name)
        if measured and run.eval_losses:
            axes[1].plot(*zip(*run.eval_losses, strict=True), color=color, marker="o", label=run.name)
    for each, label in zip(axes, ("training loss, averaged", "eval loss"), strict=False):
        each.set_ylabel(label)
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
        each.legend(loc="upper right", framealpha=0.9)
    axes[-1].set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _plot_losses(axes: Axes, rows: Sequence[StepMetrics], eval_losses: Sequence[tuple[int, float]]) -> None:
    steps, losses = [row.step for row in rows], pd.Series([row.loss for row in rows])
    span = _ewm_span(rows)
    axes.plot(
        steps,
        losses,
        color=LOSS_COLOR,
        alpha=0.25,
        linewidth=1,
        marker=_marker(rows),
        label="loss of a step",
    )
    axes.plot(
        steps,
        losses.ewm(span=span).mean(),
        color=LOSS_COLOR,
        linewidth=2,
        label=f"loss, average over about {span:.0f} steps",
    )
    highest = float(losses.quantile(0.995))
    if eval_losses:
        highest = _plot_eval_losses(axes, eval_losses, highest)
    axes.set_ylim(bottom=0, top=1.15 * highest or 1.0)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=0.9)


def _plot_eval_losses(axes: Axes, eval_losses: Sequence[tuple[int, float]], highest: float) -> float:
    """Plot the eval losses, and return the highest value on the axis of the training losses afterwards.

    Eval losses are unweighted, training losses may be weighted: if they differ too much, the eval losses get a second axis.
    """
    steps, losses = zip(*eval_losses, strict=True)
    top = max(losses)
    separate = not highest / MAX_RATIO_ON_ONE_AXIS <= top <= highest * MAX_RATIO_ON_ONE_AXIS
    (line,) = (axes.twinx() if separate else axes).plot(
        steps, losses, color=EVAL_COLOR, linewidth=1.5, marker="o", markersize=4, clip_on=False
    )
    if separate and line.axes is not None:
        line.axes.set_ylim(bottom=0, top=1.15 * top or 1.0)
        line.axes.set_ylabel("eval loss", color=EVAL_COLOR)
        line.axes.tick_params(axis="y", colors=EVAL_COLOR)
        line.axes.spines["top"].set_visible(False)
    axes.plot([], [], color=EVAL_COLOR, linewidth=1.5, marker="o", markersize=4, label="eval loss")
    return highest if separate else max(highest, top)


def _plot_grad_norms(axes: Axes, rows: Sequence[StepMetrics]) -> None:
    known = [(row.step, row.grad_norm) for row in rows if row.grad_norm is not None]
    if known:
        steps, norms = zip(*known, strict=True)
        series = pd.Series(norms)
        axes.plot(steps, series, color=NORM_COLOR, alpha=0.2, linewidth=1, marker=_marker(rows))
        axes.plot(steps, series.ewm(span=_ewm_span(rows)).mean(), color=NORM_COLOR, linewidth=1.5)
        axes.set_ylim(bottom=0, top=1.15 * float(series.quantile(0.995)) or 1.0)
    axes.set_ylabel("gradient norm", color=NORM_COLOR)
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)


def _plot_learning_rate(axes: Axes, rows: Sequence[StepMetrics]) -> None:
    learning_rates = [row.lr for row in rows]
    axes.plot([row.step for row in rows], learning_rates, color=LR_COLOR, linewidth=1.5, linestyle="--")
    axes.set_ylabel("learning rate", color=LR_COLOR)
    axes.tick_params(axis="y", colors=LR_COLOR)
    axes.set_ylim(bottom=0, top=1.15 * max(learning_rates) or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.spines["top"].set_visible(False)


def _ewm_span(rows: Sequence[StepMetrics]) -> float:
    return max(3.0, SMOOTHING_FRACTION * len(rows))


def _marker(rows: Sequence[StepMetrics]) -> str:
    return "." if len(rows) < 50 else ""
