"""The loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdxl_pipeline.files.atomic_files import atomic_path
from sdxl_pipeline.training.logging.metrics_log import StepMetrics

LOSS_COLOUR = "#1f5fa8"
EVAL_COLOUR = "#2d8a4e"
LR_COLOUR = "#c8553d"
NORM_COLOUR = "#6b6b6b"
COMPARABLE = 4.0
"""Losses of the training and the evaluation share an axis unless one is so many times the other."""

SMOOTHED_SHARE = 0.05
"""Share of the run that the smoothed curves look back over."""


def plot_loss_curve(
    rows: Sequence[StepMetrics],
    path: Path,
    title: str,
    eval_losses: Sequence[tuple[int, float]] = (),
) -> None:
    """Write a PNG: loss over steps, with the eval losses (step, loss); below it gradient norm and learning rate.

    Training losses are faint by step and strong as an exponential average. `rows` has at least one entry.
    """
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    losses, beneath = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _draw_losses(losses, rows, eval_losses)
    losses.set_title(title, loc="left")
    _draw_norms(beneath, rows)
    _draw_rates(beneath.twinx(), rows)
    beneath.set_xlabel("step")
    beneath.set_xlim(0, max(rows[-1].step, *(step for step, _ in eval_losses), 1))
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _draw_losses(axes: Axes, rows: Sequence[StepMetrics], eval_losses: Sequence[tuple[int, float]]) -> None:
    steps, losses = [row.step for row in rows], pd.Series([row.loss for row in rows])
    span = _span(rows)
    axes.plot(
        steps,
        losses,
        color=LOSS_COLOUR,
        alpha=0.25,
        linewidth=1,
        marker=_marker(rows),
        label="loss of a step",
    )
    axes.plot(
        steps,
        losses.ewm(span=span).mean(),
        color=LOSS_COLOUR,
        linewidth=2,
        label=f"loss, average over about {span:.0f} steps",
    )
    highest = float(losses.quantile(0.995))
    if eval_losses:
        highest = _draw_eval_losses(axes, eval_losses, highest)
    axes.set_ylim(bottom=0, top=1.15 * highest or 1.0)
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=0.9)


def _draw_eval_losses(axes: Axes, eval_losses: Sequence[tuple[int, float]], highest: float) -> float:
    """Draw the eval losses, and give the highest value that the axis of the losses then holds.

    They are not weighted, as the training's may be: where the two are far apart, they get an axis of their own.
    """
    steps, losses = zip(*eval_losses, strict=True)
    top = max(losses)
    apart = not highest / COMPARABLE <= top <= highest * COMPARABLE
    (line,) = (axes.twinx() if apart else axes).plot(
        steps, losses, color=EVAL_COLOUR, linewidth=1.5, marker="o", markersize=4, clip_on=False
    )
    if apart and line.axes is not None:
        line.axes.set_ylim(bottom=0, top=1.15 * top or 1.0)
        line.axes.set_ylabel("eval loss", color=EVAL_COLOUR)
        line.axes.tick_params(axis="y", colors=EVAL_COLOUR)
        line.axes.spines["top"].set_visible(False)
    axes.plot([], [], color=EVAL_COLOUR, linewidth=1.5, marker="o", markersize=4, label="eval loss")
    return highest if apart else max(highest, top)


def _draw_norms(axes: Axes, rows: Sequence[StepMetrics]) -> None:
    known = [(row.step, row.grad_norm) for row in rows if row.grad_norm is not None]
    if known:
        steps, norms = zip(*known, strict=True)
        series = pd.Series(norms)
        axes.plot(steps, series, color=NORM_COLOUR, alpha=0.2, linewidth=1, marker=_marker(rows))
        axes.plot(steps, series.ewm(span=_span(rows)).mean(), color=NORM_COLOUR, linewidth=1.5)
        axes.set_ylim(bottom=0, top=1.15 * float(series.quantile(0.995)) or 1.0)
    axes.set_ylabel("gradient norm", color=NORM_COLOUR)
    axes.grid(alpha=0.25)
    axes.spines["top"].set_visible(False)


def _draw_rates(axes: Axes, rows: Sequence[StepMetrics]) -> None:
    rates = [row.lr for row in rows]
    axes.plot([row.step for row in rows], rates, color=LR_COLOUR, linewidth=1.5, linestyle="--")
    axes.set_ylabel("learning rate", color=LR_COLOUR)
    axes.tick_params(axis="y", colors=LR_COLOUR)
    axes.set_ylim(bottom=0, top=1.15 * max(rates) or 1.0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.spines["top"].set_visible(False)


def _span(rows: Sequence[StepMetrics]) -> float:
    return max(3.0, SMOOTHED_SHARE * len(rows))


def _marker(rows: Sequence[StepMetrics]) -> str:
    return "." if len(rows) < 50 else ""
