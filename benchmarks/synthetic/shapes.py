"""Outlines of the shapes in synthetic clips, as signed distances.

Every shape is centred on the centroid of its area and reaches to distance 1 from there.
"""

from functools import lru_cache

import numpy as np

RING_HOLE = 0.55  # of its radius
STAR_WAIST = 0.42
CROSS_ARM = 0.32  # half of an arm's width


def _turns(count: int, start: float = 0.0) -> np.ndarray:
    angles = 2 * np.pi * (np.arange(count) / count + start)
    return np.stack([-np.cos(angles), np.sin(angles)], axis=-1)


def _star() -> np.ndarray:
    points = _turns(10)
    points[1::2] *= STAR_WAIST
    return points


def _cross() -> np.ndarray:
    a, b = CROSS_ARM, 1.0
    arm = np.array([[-b, -a], [-b, a], [-a, a]])
    quarter_turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = 2 * np.pi * np.arange(32) / 32
    rows = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([rows, 16 * np.sin(t) ** 3], axis=-1)


_POLYGONS = {
    "square": lambda: _turns(4, 1 / 8),
    "triangle": lambda: _turns(3),
    "star": _star,
    "cross": _cross,
    "hexagon": lambda: _turns(6),
    "heart": _heart,
}
_ROUND = ("circle", "ring")
KNOWN_SHAPES = (*_ROUND, *_POLYGONS)


@lru_cache
def outline(shape: str) -> np.ndarray:
    """Return the corners [N, 2], (row, column), of a polygon, centred on its centroid and of radius 1."""
    corners = _POLYGONS[shape]()
    following = np.roll(corners, -1, axis=0)
    cross = corners[:, 0] * following[:, 1] - following[:, 0] * corners[:, 1]
    corners = corners - ((corners + following) * cross[:, None]).sum(0) / (3 * cross.sum())
    return corners / np.linalg.norm(corners, axis=-1).max()


def signed_distance(shape: str, points: np.ndarray) -> np.ndarray:
    """Return the distances [...] of points [..., 2] to the border of a shape, negative inside."""
    if shape in _ROUND:
        distance = np.linalg.norm(points, axis=-1)
        middle, half = (0.0, 1.0) if shape == "circle" else ((1 + RING_HOLE) / 2, (1 - RING_HOLE) / 2)
        return np.abs(distance - middle) - half
    corners = outline(shape)
    edges = np.roll(corners, -1, axis=0) - corners
    to_point = points[..., None, :] - corners  # [..., N, 2]
    along = ((to_point * edges).sum(-1) / (edges * edges).sum(-1)).clip(0, 1)
    nearest = np.linalg.norm(to_point - along[..., None] * edges, axis=-1).min(-1)
    # A point is inside if a ray from it to the right crosses the border an odd number of times.
    above = to_point[..., 0] >= 0
    straddles = above != np.roll(above, -1, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = corners[:, 1] + to_point[..., 0] * (edges[:, 1] / edges[:, 0])
    inside = (straddles & (points[..., None, 1] < crossing)).sum(-1) % 2 == 1
    return np.where(inside, -nearest, nearest)
