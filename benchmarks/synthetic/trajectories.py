"""Paths of moving objects, as functions of time from 0 to 1."""

from collections.abc import Callable

import numpy as np

Path = Callable[[np.ndarray], np.ndarray]


def _line(t: np.ndarray) -> np.ndarray:
    return np.stack([0 * t, t], -1)


def _accelerate(t: np.ndarray) -> np.ndarray:
    return np.stack([0 * t, t**2], -1)


def _arc(t: np.ndarray) -> np.ndarray:
    return np.stack([0.35 * np.cos(np.pi * (t - 0.5)), t], -1)


def _circle(t: np.ndarray) -> np.ndarray:
    return 0.4 * np.stack([np.sin(2 * np.pi * t), -np.cos(2 * np.pi * t)], -1)


def _zigzag(t: np.ndarray) -> np.ndarray:
    return np.stack([0.4 * np.abs((3 * t + 0.5) % 2 - 1), t], -1)


def _bounce(t: np.ndarray) -> np.ndarray:
    return np.stack([-0.55 * np.abs(np.sin(2 * np.pi * t)), 0.9 * t], -1)


def _still(t: np.ndarray) -> np.ndarray:
    return np.stack([0 * t, 0 * t], -1)


def _wave(t: np.ndarray) -> np.ndarray:
    return np.stack([0.2 * np.sin(2 * np.pi * t), t], -1)


def _spiral(t: np.ndarray) -> np.ndarray:
    angle = 2.6 * np.pi * t
    return 0.45 * (0.25 + 0.75 * t)[..., None] * np.stack([np.sin(angle), np.cos(angle)], -1)


# Of paths that travel, across about one unit of length.
PATHS: dict[str, Path] = {
    "line": _line,
    "accelerate": _accelerate,
    "arc": _arc,
    "circle": _circle,
    "zigzag": _zigzag,
    "bounce": _bounce,
    "still": _still,
    "wave": _wave,
    "spiral": _spiral,
}


def place_path(
    name: str, times: np.ndarray, reach: float, low: np.ndarray, high: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return a path [T, 2], (rows, columns), turned at random and at a random position inside [low, high].

    The path is scaled by `reach`, and shrunk further if it does not fit into the box.
    """
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    path = reach * PATHS[name](times) @ turn.T
    extent = np.ptp(path, axis=0)
    room = np.maximum(high - low, 0)
    path = path * min(1.0, *(room / np.maximum(extent, 1e-9)))
    first, last = low - path.min(0), high - path.max(0)
    return path + rng.uniform(np.minimum(first, last), np.maximum(first, last))
