"""Figures with axes: the losses of a run. Drawn by matplotlib, which is imported on use."""

import base64
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#3c64be", "#cd3c32", "#288c46"


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, width x height inches of 100 pixels, in no window and not known to pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'fastvmt[eval]'") from error
    return Figure(figsize=(width, height), dpi=100, layout="constrained")


def loss_curves(losses: Sequence[Sequence[float]]) -> "Figure":
    """Draw the motion loss at each fresh gradient as its ratio to the first of the same guided step.

    Each step has another noise level, so that losses of different steps do not compare.

    Args:
        losses: as in a run's record, one list for each guided step.

    Raises:
        ValueError: no loss is above 0.
        ImportError: matplotlib is not installed.
    """
    if not any(0 < value < math.inf for step in losses for value in step):
        raise ValueError("losses must hold numbers above 0; a run without guidance has none")
    figure = new_figure(8.6, 3.4)
    axes = figure.add_subplot(xlabel="guided step", ylabel="motion loss / the step's first")
    axes.set_ylim(0, 1.3)  # a loss may rise at the highest noise
    for step, values in enumerate(losses):
        times = [step + 1 + index / len(values) for index in range(len(values))]
        axes.plot(times, [value / (values[0] or 1) for value in values], ".-", color=BLUE)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3, which="both")
    return figure


@lru_cache(maxsize=8)
def loss_sketch(losses: tuple[float, ...]) -> str:
    """Draw a small curve of losses, one a guided step, without axes: an SVG as a data URL for an image."""
    figure = new_figure(2.4, 0.72)
    figure.add_subplot(frame_on=False, xticks=[], yticks=[]).plot(losses, color=BLUE)
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
