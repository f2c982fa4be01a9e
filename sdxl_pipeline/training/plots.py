"""The loss curve of a run."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sdxl_pipeline.store.files import atomic_path
from sdxl_pipeline.training.metrics import StepMetrics

LOSS_COLOUR = "#1f5fa8"
LR_COLOUR = "#c8553d"
SMOOTHED_SHARE = 0.05
"""Share of the run that the smoothed curve looks back over."""


def plot_loss_curve(rows: Sequence[StepMetrics], path: Path, title: str) -> None:
    """Write a PNG: loss per step faint, its exponential average strong, learning rate on the right-hand axis."""
    steps = [row.step for row in rows]
    losses = pd.Series([row.loss for row in rows])
    span = max(3.0, SMOOTHED_SHARE * len(rows))

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.add_subplot()
    lr_axis = loss_axis.twinx()
    loss_axis.set_zorder(lr_axis.get_zorder() + 1)  # the loss is what one looks for: draw it above the rate
    loss_axis.patch.set_visible(False)

    (rate,) = lr_axis.plot(
        steps, [row.lr for row in rows], color=LR_COLOUR, linewidth=1, linestyle="--", label="learning rate"
    )
    (raw,) = loss_axis.plot(
        steps,
        losses,
        color=LOSS_COLOUR,
        alpha=0.25,
        linewidth=1,
        marker="." if len(rows) < 50 else "",
        label="loss",
    )
    (smooth,) = loss_axis.plot(
        steps,
        losses.ewm(span=span).mean(),
        color=LOSS_COLOUR,
        linewidth=2,
        label=f"loss, average over about {span:.0f} steps",
    )
    loss_axis.set(xlabel="step", ylabel="loss", title=title)
    loss_axis.set_ylim(bottom=0, top=1.15 * float(losses.quantile(0.995)) or 1.0)
    loss_axis.grid(alpha=0.25)
    lr_axis.set_ylabel("learning rate", color=LR_COLOUR)
    lr_axis.tick_params(axis="y", colors=LR_COLOUR)
    lr_axis.set_ylim(bottom=0, top=1.3 * max(row.lr for row in rows) or 1.0)
    lr_axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    loss_axis.legend(handles=[raw, smooth, rate], loc="upper right", framealpha=0.9)
    for axis in (loss_axis, lr_axis):
        axis.spines["top"].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
