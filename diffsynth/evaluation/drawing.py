"""Drawing on frames with smooth edges: layers, arrows, the paths of objects."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffsynth.data import fit_frame
from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video
from diffsynth.evaluation.tracking import video_array

PAPER, INK = (255, 255, 255), (40, 40, 40)
# Smaller frames are enlarged, by a whole factor, until their shorter side has this many pixels.
LEAST_SIDE = 256
# Layers are drawn this many times larger and then reduced, which smooths the edges of lines.
FINER = 3
PATH_COLOURS = ((230, 60, 50), (50, 110, 220), (40, 160, 80), (200, 140, 20))
_HEAD = 0.45  # largest share of an arrow's length that its head takes

Point = tuple[float, float]  # (column, row) in pixels, as PIL has it
Colour = tuple[int, ...]  # red, green, blue and, on a layer, opacity: 0 to 255


@lru_cache
def text_font(size: int = 14) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the font of all pictures, `size` pixels high."""
    return ImageFont.load_default(size)


def legible_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the (width, height) at which to draw on frames of a (width, height)."""
    factor = max(1, math.ceil(LEAST_SIDE / min(size)))
    return size[0] * factor, size[1] * factor


def fine_layer(size: tuple[int, int]) -> Image.Image:
    """Return a transparent RGBA layer for a picture of (width, height), FINER times as large as that."""
    return Image.new("RGBA", (size[0] * FINER, size[1] * FINER))


def over(frame: Image.Image, *layers: Image.Image) -> Image.Image:
    """Return the frame, RGB, with layers put over it that have its size or were made by `fine_layer`."""
    picture = frame.convert("RGBA")
    for layer in layers:
        picture.alpha_composite(layer if layer.size == frame.size else layer.reduce(FINER))
    return picture.convert("RGB")


def draw_arrow(draw: ImageDraw.ImageDraw, start: Point, end: Point, colour: Colour, width: float) -> None:
    """Draw an arrow with its tip at `end`; one shorter than its own width is a dot at `start`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < width:
        _dot(draw, start, width / 2, colour)
        return
    head = min(_HEAD * length, 4 * width)
    along, across = (dx / length, dy / length), (-dy / length, dx / length)
    neck = (end[0] - head * along[0], end[1] - head * along[1])
    half = max(head * 0.5, width / 2)
    corners = [(neck[0] + side * half * across[0], neck[1] + side * half * across[1]) for side in (-1, 1)]
    draw.line([start, neck], colour, max(1, round(width)))
    draw.polygon([end, *corners], colour)


def _dot(draw: ImageDraw.ImageDraw, centre: Point, radius: float, colour: Colour) -> None:
    draw.ellipse([centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius], colour)


def draw_trajectories(
    frames: Video, paths: Mapping[str, np.ndarray] | Sequence[np.ndarray]
) -> list[Image.Image]:
    """Draw the paths of objects so far over each frame, with a dot where each is; small frames are enlarged.

    Args:
        frames: the video, T frames.
        paths: each float [T, 2], (row, column) in pixels of the frames, as `track_object(...).centroids`.
            The names of a mapping are written beside the dots.

    Raises:
        ValueError: a path is not [T, 2], or not finite.
    """
    video = video_array(frames)
    named = dict(paths) if isinstance(paths, Mapping) else {str(i): path for i, path in enumerate(paths)}
    for name, path in named.items():
        if np.shape(path) != (len(video), 2) or not np.isfinite(path).all():
            raise ValueError(f"path {name!r} must be [{len(video)}, 2], finite; got {list(np.shape(path))}")
    size = legible_size((video.shape[2], video.shape[1]))
    factor = size[0] / video.shape[2] * FINER
    drawn = []
    for t, frame in enumerate(rgb_frames(video)):
        layer = fine_layer(size)
        draw = ImageDraw.Draw(layer)
        for index, (name, path) in enumerate(named.items()):
            colour = (*PATH_COLOURS[index % len(PATH_COLOURS)], 255)
            points = [(float(col * factor), float(row * factor)) for row, col in path[: t + 1]]
            for ink, width, radius in (((*PAPER, 255), 5, 6), (colour, 2.5, 4.5)):
                draw.line(points, ink, round(width * FINER), joint="curve")
                _dot(draw, points[-1], radius * FINER, ink)
            if isinstance(paths, Mapping):
                place = (points[-1][0] + 9 * FINER, points[-1][1])
                font = text_font(14 * FINER)
                draw.text(place, name, INK, font, "lm", stroke_width=2 * FINER, stroke_fill=PAPER)
        drawn.append(over(fit_frame(frame, size[1], size[0]), layer))
    return drawn
