"""Measure videos of one sprite before one colour: where the object is, and whether it is still itself.

Videos are uint8 [T, H, W, 3]; paths are float [T, 2], (row, column) in pixels.
"""

import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.quality.adherence import bilinear
from benchmarks.quality.metrics import SPAN, widened

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_nano"))
from sprite_package import CODES, sprite
from sprite_scenes import SUPERSAMPLING, with_cut_out

_CLEAR, _FAINT = 40, 20  # levels of 255 between object and ground; the second where next to nothing is clear
_LEAST_PIXELS = 3
_SAME_GROUND = 30  # levels of 255, in the channel that differs most


def ground_colour(frames: np.ndarray) -> np.ndarray:
    """Return the background's colour [3], the median of all pixels."""
    return np.median(frames.reshape(-1, 3), axis=0)


def object_masks(frames: np.ndarray) -> np.ndarray:
    """Return the pixels that differ from the background: bool [T, H, W]."""
    difference = np.abs(frames - ground_colour(frames)).max(-1)
    clear = difference > _CLEAR
    faint = clear.sum((1, 2)) <= _LEAST_PIXELS + 1
    clear[faint] = difference[faint] > _FAINT
    return clear


def centres(frames: np.ndarray) -> np.ndarray:
    """Return the path of the object's centre; the picture's middle where no object is seen."""
    middle = np.array(frames.shape[1:3]) / 2
    masks = object_masks(frames)
    return np.array(
        [np.argwhere(mask).mean(0) + 0.5 if mask.sum() >= _LEAST_PIXELS else middle for mask in masks]
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the likeness of two videos in dB."""
    return float(-10 * np.log10(np.square((a.astype(float) - b) / 255).mean() + 1e-10))


def moved(frames: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return frames, each moved by its own (down, right) of `offsets` [T, 2]; the background fills up."""
    ground, size = ground_colour(frames), np.array(frames.shape[1:3])
    places = np.indices(size).reshape(2, -1).T
    out = np.empty_like(frames)
    for t, offset in enumerate(offsets):
        source = places - offset
        inside = ((source > -1) & (source < size)).all(1)
        values = np.where(inside[:, None], bilinear(frames[t].astype(float), source), ground)
        out[t] = values.round().reshape(frames[t].shape)
    return out


def psnr_along(frames: np.ndarray, truth: np.ndarray) -> float:
    """Return the likeness in dB to the truth whose object is moved along the path that the video's took."""
    return psnr(frames, moved(truth, centres(frames) - centres(truth)))


def path_length(path: np.ndarray) -> float:
    """Return how far a path goes, by steps of `SPAN` frames, so that jitter of single frames is no way."""
    return float(np.linalg.norm(np.diff(path[::SPAN], axis=0), axis=1).sum())


def background_right(frames: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of the pixels away from the video's object that have the truth's background colour."""
    outside = ~widened(object_masks(frames))
    right = np.abs(frames - ground_colour(truth)).max(-1) < _SAME_GROUND
    return float(right[outside].mean()) if outside.any() else 0.0


def nearest_sprite(frame: np.ndarray, layer: np.ndarray, names: Sequence[str] = tuple(CODES)) -> str | None:
    """Return the sprite that is most like the object of a frame [H, W, 3]; None if there is no object.

    Every sprite, mirrored and not, is drawn where the object is, over the frame's background.

    Args:
        frame: the frame.
        layer: map [2, 3] from a sprite's coordinates to pixels, for its size and turn.
        names: of the sprites that are compared.
    """
    if object_masks(frame[None]).sum() < _LEAST_PIXELS:
        return None
    place = centres(frame[None])
    height, width = frame.shape[:2]
    colour = tuple(ground_colour(frame[None]).astype(int).tolist())
    ground = Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * height), colour)
    middle = np.concatenate([layer[:, :2], np.array([[height], [width]]) / 2], axis=1)
    errors = {}
    for name in names:
        image = sprite(name)
        for seen in (image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            drawn = np.asarray(with_cut_out(ground, seen, middle).reduce(SUPERSAMPLING))[None]
            error = -psnr(frame[None], moved(drawn, place - centres(drawn)))
            errors[name] = min(error, errors.get(name, error))
    return min(errors, key=errors.__getitem__)


def variety(videos: Sequence[np.ndarray]) -> float:
    """Return the mean difference, 0 to 1, of the videos of several seeds, around their objects.

    Each is moved so that its object is in the middle; compared is half of the side around it.
    """
    height, width = videos[0].shape[1:3]
    rows, columns = (slice(side // 4, side - side // 4) for side in (height, width))
    laid = [
        moved(video, np.array([height, width]) / 2 - centres(video))[:, rows, columns] for video in videos
    ]
    pairs = [np.abs(a.astype(float) - b).mean() / 255 for a, b in combinations(laid, 2)]
    return float(np.mean(pairs))
