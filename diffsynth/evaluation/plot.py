"""Curves with axes, as pictures, and the losses of a run drawn so."""

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

from diffsynth.evaluation.drawing import FAINT, INK, PAPER, Point, Sketch, over, text_font, tick_values

SIZE = (860, 340)  # pixels: width, height
BLUE, RED, GREEN = (60, 100, 190), (205, 60, 50), (40, 140, 70)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 26, 46


class Plot:
    """Axes over the numbers (lowest, highest) across and up, and what is drawn on them so far.

    picture: RGB, SIZE pixels. Raises ValueError for a range that is empty or not finite.
    """

    def __init__(
        self, across: tuple[float, float], up: tuple[float, float], across_label: str, up_label: str
    ) -> None:
        for low, high in (across, up):
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"an axis must go from a number to a higher one; got {low!r} to {high!r}")
        self._across, self._up = across, up
        self.picture = Image.new("RGB", SIZE, PAPER)
        draw, font = ImageDraw.Draw(self.picture), text_font(13)
        for number in tick_values(*across):
            x = self._place((number, up[0]))[0]
            draw.line([(x, _TOP), (x, SIZE[1] - _BOTTOM)], fill=FAINT)
            draw.text((x, SIZE[1] - _BOTTOM + 12), f"{number:.4g}", fill=INK, font=font, anchor="mm")
        for number in tick_values(*up):
            y = self._place((across[0], number))[1]
            draw.line([(_LEFT, y), (SIZE[0] - _RIGHT, y)], fill=FAINT)
            draw.text((_LEFT - 8, y), f"{number:.4g}", fill=INK, font=font, anchor="rm")
        draw.text((SIZE[0] / 2, SIZE[1] - 14), across_label, fill=INK, font=font, anchor="mm")
        draw.text((8, 12), up_label, fill=INK, font=font, anchor="lm")

    def curve(self, points: Sequence[Point], colour: tuple[int, int, int], filled: int = 0) -> None:
        """A line through the points; the first `filled` of them have dots."""
        sketch = Sketch(SIZE)
        places = [self._place(point) for point in points]
        for start, end in pairwise(places):
            sketch.line(start, end, (*colour, 255), 1.5)
        for place in places[:filled]:
            sketch.dot(place, 3.5, (*colour, 255))
        self.picture = over(self.picture, sketch.layer())

    def text(self, point: Point, text: str, colour: tuple[int, int, int]) -> None:
        """Words that begin at a point."""
        draw = ImageDraw.Draw(self.picture)
        draw.text(self._place(point), text, fill=colour, font=text_font(14), anchor="lm")

    def _place(self, point: Point) -> Point:
        x = (point[0] - self._across[0]) / (self._across[1] - self._across[0])
        y = (point[1] - self._up[0]) / (self._up[1] - self._up[0])
        return _LEFT + x * (SIZE[0] - _LEFT - _RIGHT), SIZE[1] - _BOTTOM - y * (SIZE[1] - _TOP - _BOTTOM)


def loss_curves(losses: Sequence[Sequence[float]]) -> Image.Image:
    """log10 of the motion loss at each fresh gradient, guided step by guided step, in two colours in turn.

    losses: as in a run's record, one list for each guided step. Raises ValueError if there are none above 0.
    """
    logs = [[math.log10(value) if value > 0 else math.nan for value in step] for step in losses]
    known = [value for step in logs for value in step if math.isfinite(value)]
    if not known:
        raise ValueError("losses must hold numbers above 0; a run without guidance has none")
    low, high = min(known), max(known)
    room = 0.05 * (high - low) + 0.01
    plot = Plot((0.0, float(len(logs))), (low - room, high + room), "guided step", "log10 of the motion loss")
    for step, values in enumerate(logs):
        points = [(step + k / len(values), v) for k, v in enumerate(values) if math.isfinite(v)]
        plot.curve(points, (BLUE, RED)[step % 2], filled=len(points))
    return plot.picture
