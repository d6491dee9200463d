"""Figures with axes: losses of a run, heat maps of a probe. Drawn by matplotlib, which is imported on use."""

import base64
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, RED, GREEN = "#3c64be", "#cd3c32", "#288c46"
_WIDEST = 24  # inches


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in no window and not known to pyplot.

    Args:
        width: in inches of 100 pixels.
        height: likewise.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that has it.
    """
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
    axes.set_ylim(bottom=0)
    for step, values in enumerate(losses):
        times = [step + 1 + index / len(values) for index in range(len(values))]
        axes.plot(times, [value / (values[0] or 1) for value in values], ".-", color=BLUE)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.3, which="both")
    return figure


@lru_cache(maxsize=8)
def loss_sketch(losses: tuple[float, ...]) -> str:
    """Draw a small curve of losses without axes.

    Args:
        losses: one for each guided step.

    Returns:
        An SVG as a data URL, for the `src` of an image.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(2.4, 0.72)
    figure.add_subplot(frame_on=False, xticks=[], yticks=[]).plot(losses, color=BLUE)
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def heat_maps(
    values: np.ndarray, titles: Sequence[str], rows: Sequence[str], columns: Sequence[str], headline: str
) -> "Figure":
    """Draw tables of correlations as colours with their numbers; the highest of all has a frame.

    Args:
        values: [panels, rows, columns] in [-1, 1]; 1 is red, 0 white, -1 blue.
        titles: one for each panel.
        rows: names of the rows.
        columns: names of the columns.
        headline: above all panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    width, height = 1 + 0.66 * len(columns), 0.8 + 0.25 * len(rows)
    beside = max(1, min(len(values), int(_WIDEST // width)))
    below = -(-len(values) // beside)
    figure = new_figure(beside * width, 0.4 + below * height)
    figure.suptitle(headline)
    best = np.unravel_index(values.argmax(), values.shape)
    for index, (table, title) in enumerate(zip(values, titles, strict=True)):
        axes = figure.add_subplot(below, beside, index + 1, title=title)
        axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, fontsize=8)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        for row, column in np.ndindex(*table.shape):
            value = table[row, column]
            ink = "white" if abs(value) > 0.6 else "black"
            frame = {"fill": False, "edgecolor": ink} if (index, row, column) == best else None
            axes.text(
                column, row, f"{value:.2f}", color=ink, fontsize=8, ha="center", va="center", bbox=frame
            )
    return figure
