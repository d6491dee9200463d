"""What the pictures share: colours of paper and ink, text that fits, arrows without jagged edges."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (215, 215, 215)
# Pictures of smaller frames are enlarged, by a whole factor, until their shorter side has this many pixels.
LEAST_SIDE = 256
# Lines are drawn this many times larger and then reduced, which smooths their edges.
_FINER = 3
_HEAD = 0.45  # of an arrow's length, at most

Point = tuple[float, float]  # (column, row) in pixels, as PIL has it


def text_font(size: int = 14) -> ImageFont.FreeTypeFont:
    """The font of all pictures, `size` pixels high."""
    return ImageFont.load_default(size)


def fitted_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut short with dots at its end if it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept and font.getlength(text[:kept].rstrip() + "...") > width:
        kept -= 1
    return text[:kept].rstrip() + "..."


def legible_size(size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) at which to draw on frames of a (width, height)."""
    factor = max(1, math.ceil(LEAST_SIDE / min(size)))
    return size[0] * factor, size[1] * factor


class Sketch:
    """Lines with smooth edges on a transparent picture of a (width, height); later ones cover earlier ones.

    Colours are (red, green, blue, opacity), 0 to 255; places (column, row) and widths in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self._size = size
        self._layer = Image.new("RGBA", (size[0] * _FINER, size[1] * _FINER))
        self._draw = ImageDraw.Draw(self._layer)

    def line(self, start: Point, end: Point, colour: tuple[int, ...], width: float) -> None:
        self._draw.line([_finer(start), _finer(end)], colour, max(1, round(width * _FINER)))

    def polygon(self, points: Sequence[Point], colour: tuple[int, ...]) -> None:
        self._draw.polygon([_finer(point) for point in points], colour)

    def dot(self, centre: Point, radius: float, colour: tuple[int, ...]) -> None:
        (x, y), r = _finer(centre), radius * _FINER
        self._draw.ellipse([x - r, y - r, x + r, y + r], colour)

    def layer(self) -> Image.Image:
        """What was drawn, RGBA, to be put over a picture with `over`."""
        # Colours are weighed by their opacity while they are averaged; else edges would turn dark.
        return self._layer.convert("RGBa").resize(self._size, Image.Resampling.BOX).convert("RGBA")


def draw_arrow(sketch: Sketch, start: Point, end: Point, colour: tuple[int, ...], width: float) -> None:
    """An arrow with its tip at `end`. Shorter than its own width, it is a dot at `start`."""
    (x, y), (dx, dy) = start, (end[0] - start[0], end[1] - start[1])
    length = math.hypot(dx, dy)
    if length < width:
        sketch.dot(start, width / 2, colour)
        return
    head = min(_HEAD * length, 4 * width)
    along, across = (dx / length, dy / length), (-dy / length, dx / length)
    neck = (end[0] - head * along[0], end[1] - head * along[1])
    half = max(head * 0.5, width / 2)
    corners = [(neck[0] + side * half * across[0], neck[1] + side * half * across[1]) for side in (-1, 1)]
    sketch.line((x, y), neck, colour, width)
    sketch.polygon([end, *corners], colour)


def over(frame: Image.Image, *layers: Image.Image) -> Image.Image:
    """The frame with RGBA layers of its size put over it, RGB."""
    picture = frame.convert("RGBA")
    for layer in layers:
        picture.alpha_composite(layer)
    return picture.convert("RGB")


def tick_values(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers for an axis from low to high, about as many as asked; 1, 2 or 5 times a power of ten
    apart.
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def hue_colours(hues: np.ndarray) -> np.ndarray:
    """Full colours of hues in 0 to 1, [N] -> uint8 [N, 3]."""
    hsv = np.stack([hues % 1 * 255, np.full_like(hues, 210), np.full_like(hues, 255)], axis=-1)
    return np.asarray(Image.fromarray(hsv.round().astype(np.uint8)[None], mode="HSV").convert("RGB"))[0]


def _finer(point: Point) -> Point:
    return point[0] * _FINER, point[1] * _FINER
