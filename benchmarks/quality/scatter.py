"""A scatter picture of methods: what each costs against how far it is off."""

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from benchmarks.quality.statistics import Interval

SIZE = (900, 560)
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 20, 60  # margins in pixels
_PAPER, _INK, _FAINT = (255, 255, 255), (40, 40, 40), (215, 215, 215)
_MARK, _FRONT_MARK = (70, 110, 190), (200, 60, 50)


def pareto_picture(points: Mapping[str, tuple[float, Interval]], x_label: str, y_label: str) -> Image.Image:
    """Points by name, (x, y with its interval); those that no other beats in both are red.

    Less is better on both axes. Raises ValueError without points.
    """
    if not points:
        raise ValueError("points must hold at least one method")
    picture = Image.new("RGB", SIZE, _PAPER)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(size=13)
    far = _round_up(max(x for x, _ in points.values())), _round_up(max(y.value for _, y in points.values()))

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / far[0] * (SIZE[0] - _LEFT - _RIGHT)
        return across, SIZE[1] - _BOTTOM - min(y, far[1]) / far[1] * (SIZE[1] - _TOP - _BOTTOM)

    for k in range(6):
        (x, bottom), (left, y) = place(far[0] * k / 5, 0), place(0, far[1] * k / 5)
        draw.line([(x, _TOP), (x, bottom)], fill=_FAINT)
        draw.line([(left, y), (SIZE[0] - _RIGHT, y)], fill=_FAINT)
        draw.text((x, bottom + 14), f"{far[0] * k / 5:g}", fill=_INK, font=font, anchor="mm")
        draw.text((left - 8, y), f"{far[1] * k / 5:g}", fill=_INK, font=font, anchor="rm")
    draw.text((SIZE[0] / 2, SIZE[1] - 18), x_label, fill=_INK, font=font, anchor="mm")
    draw.text((_LEFT + 8, _TOP + 8), y_label, fill=_INK, font=font, anchor="lm")
    front = pareto_front({name: (x, y.value) for name, (x, y) in points.items()})
    for name, (x, y) in points.items():
        colour = _FRONT_MARK if name in front else _MARK
        across, down = place(x, y.value)
        if not math.isnan(y.low):
            draw.line([place(x, y.low), place(x, y.high)], fill=colour)
        draw.ellipse([across - 4, down - 4, across + 4, down + 4], fill=colour)
        anchor, shift = ("rm", -8) if across > SIZE[0] * 0.7 else ("lm", 8)
        draw.text((across + shift, down), name, fill=_INK, font=font, anchor=anchor)
    return picture


def pareto_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """Names of the points that no other point equals or beats in both numbers, and beats in one."""
    return {
        name
        for name, (x, y) in points.items()
        if not any(a <= x and b <= y and (a < x or b < y) for a, b in points.values())
    }


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value)
