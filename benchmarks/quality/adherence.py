"""Does a video show what its prompt says: the colour nearest by name, the shape by comparing outlines.

Names and colours are those of `benchmarks.synthetic.clips`. Nothing here is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.synthetic.clips import COLOURS, SHAPES
from benchmarks.synthetic.shapes import KNOWN_SHAPES, signed_distance
from diffsynth.data.tensors import Video
from diffsynth.evaluation.tracking import Track, track_object

# Side of the square in which outlines are compared, and half of it in units of sqrt(area / pi). The farthest
# point of any shape is 2.2 such units from its centre.
GRID = 32
REACH = 2.3
TURN_STEP = 9.0  # degrees between the turns in which a shape is tried
# Turns (degrees) after which a shape looks the same.
_PERIOD = {"circle": 9, "ring": 9, "square": 90, "triangle": 120, "star": 72, "cross": 90, "hexagon": 60}
# CIELAB, D65: linear RGB to XYZ over the white point.
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _TO_XYZ.sum(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Adherence:
    """Whether the video shows what was asked for, and what it shows; shape_seen is None without an object."""

    shape_right: bool
    colour_right: bool
    background_right: bool
    shape_seen: str | None
    colour_seen: str
    background_seen: str


def check_prompt(
    frames: Video, shape: str, colour: str, background: str, track: Track | None = None
) -> Adherence:
    """Compare a video with a prompt "a <colour> <shape> on a <background> background".

    track: of these frames, if it is known already. Without an object, shape and colour are wrong.
    Raises ValueError for names that are not in the vocabulary.
    """
    for name, given, known in (
        ("shape", shape, SHAPES),
        ("colour", colour, COLOURS),
        ("background", background, COLOURS),
    ):
        if given not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {given!r}")
    track = track_object(frames) if track is None else track
    seen = shape_of(track.masks) if track.found.any() else None
    colour_seen, background_seen = colour_of(track.colour), colour_of(track.background)
    return Adherence(
        shape_right=seen == shape,
        colour_right=seen is not None and colour_seen == colour,
        background_right=background_seen == background,
        shape_seen=seen,
        colour_seen=colour_seen,
        background_seen=background_seen,
    )


def colour_of(rgb: Sequence[float] | np.ndarray) -> str:
    """The name in COLOURS that is nearest to an RGB colour (0 to 255) in CIELAB.

    In RGB itself a darker white is pink and a darker yellow orange.
    """
    palette = _lab(np.array(list(COLOURS.values())))
    distances = np.linalg.norm(palette - _lab(np.asarray(rgb)), axis=-1)
    return list(COLOURS)[int(distances.argmin())]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of sRGB colours [..., 3] from 0 to 255."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    xyz = linear @ _TO_XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def shape_of(masks: np.ndarray, candidates: Sequence[str] = SHAPES) -> str:
    """The shape whose outline, at any turn, is most like the masks bool [T, H, W], frame by frame.

    Each mask is centred and brought to the same area; likeness is the shared part of two outlines over their
    union. A shape's score is the mean over frames of its best turn. Masks at the picture's border, where
    something may be cut off, count only if there are no others.
    Raises ValueError for unknown candidates, or if all masks are empty.
    """
    scores = shape_scores(masks, candidates)
    return max(scores, key=scores.__getitem__)


def shape_scores(masks: np.ndarray, candidates: Sequence[str] = SHAPES) -> dict[str, float]:
    """The likeness, 0 to 1, of masks to each candidate: see `shape_of`."""
    unknown = [name for name in candidates if name not in KNOWN_SHAPES]
    if unknown or not candidates:
        raise ValueError(f"candidates must be of {', '.join(KNOWN_SHAPES)}; got {tuple(candidates)!r}")
    whole = masks[masks.any((1, 2))]
    if not len(whole):
        raise ValueError("masks are all empty: there is no shape to name")
    at_border = whole[:, [0, -1]].any((1, 2)) | whole[:, :, [0, -1]].any((1, 2))
    if not at_border.all():
        whole = whole[~at_border]
    outlines = np.stack([_normalised(mask) for mask in whole]).reshape(len(whole), -1)
    scores = {}
    for name in candidates:
        templates = _templates(name)
        shared = np.minimum(outlines[:, None], templates).sum(-1)
        union = np.maximum(outlines[:, None], templates).sum(-1)
        scores[name] = float((shared / union).max(1).mean())
    return scores


def _grid() -> np.ndarray:
    """Places [GRID * GRID, 2] (row, column), in units of sqrt(area / pi), around the centroid."""
    side = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * REACH
    return np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)


def _normalised(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] centred and scaled to the grid, between 0 and 1: float32 [GRID * GRID]."""
    rows, cols = np.nonzero(mask)
    centre = np.array([rows.mean(), cols.mean()])
    places = _grid() * np.sqrt(len(rows) / np.pi) + centre + 1
    padded = np.pad(mask.astype(np.float32), 1)
    return bilinear(padded, places)


def bilinear(picture: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values [N, ...] of a picture [H, W, ...] at places [N, 2], (row, column) with pixel centres at whole
    numbers. Places outside of the picture take the value at its border.
    """
    limit = np.array(picture.shape[:2]) - 1
    places = places.clip(0, limit)
    low = np.minimum(places.astype(int), np.maximum(limit - 1, 0))
    high = np.minimum(low + 1, limit)
    down, right = (places - low).astype(np.float32).T.reshape(2, -1, *[1] * (picture.ndim - 2))
    top = picture[low[:, 0], low[:, 1]] * (1 - right) + picture[low[:, 0], high[:, 1]] * right
    bottom = picture[high[:, 0], low[:, 1]] * (1 - right) + picture[high[:, 0], high[:, 1]] * right
    return top * (1 - down) + bottom * down


@lru_cache
def _templates(shape: str) -> np.ndarray:
    """A shape's outline at every turn at which it looks different: float32 [turns, GRID * GRID]."""
    cell = 2 * REACH / GRID
    # The radius at which the area is pi, as that of the normalised masks.
    fine = np.stack(np.meshgrid(*[np.linspace(-1, 1, 401)] * 2, indexing="ij"), axis=-1)
    radius = np.sqrt(np.pi / (4 * (signed_distance(shape, fine) < 0).mean()))
    turns = np.deg2rad(np.arange(0, _PERIOD.get(shape, 360), TURN_STEP))
    pictures = []
    for cos, sin in zip(np.cos(turns), np.sin(turns), strict=True):
        own = _grid() @ np.array([[cos, -sin], [sin, cos]]) / radius
        pictures.append((0.5 - signed_distance(shape, own) * radius / cell).clip(0, 1))
    return np.stack(pictures).astype(np.float32)
