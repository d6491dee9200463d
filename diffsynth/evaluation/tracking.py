"""Follow the one object of a video by its colour: what differs from the background, frame by frame.

A background of one colour, lit unevenly or checkered, is a stretch of a ray in RGB: its colour at different
brightness. The object is the largest connected patch that is far from it. No motion is assumed, so that a
video that does not follow its reference is tracked as well as one that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffsynth.data.frames import rgb_frames

Frames = Sequence[Image.Image] | np.ndarray

# A background's brightness against its most frequent one; the generated backgrounds span 0.72 to 1.39.
SHADES = (0.65, 1.45)
# Distances in RGB, 0 to 441. What is nearer to the background is background, whatever the object's colour.
LEAST_DISTANCE = 30.0
LEAST_AREA = 0.005  # of the picture
_BIN = 16  # RGB levels that count as one colour when the background is looked for
_CANDIDATES = 12
_SPARSE = 2  # rows and columns between the pixels that are looked at for it


@dataclass(frozen=True, kw_only=True, slots=True)
class Track:
    """An object's way through a video of T frames.

    centroids: float32 [T, 2], (row, column) in pixels, the first pixel's centre at 0.5; where the object is
    not found, between its neighbours in time, and in the middle of the picture if it never is.
    found: bool [T]. masks: bool [T, H, W]. colour, background: median RGB of the object's and of all other
    pixels over the video, float32 [3]; colour is the background's if nothing is found.
    """

    centroids: np.ndarray
    found: np.ndarray
    masks: np.ndarray
    colour: np.ndarray
    background: np.ndarray


def video_array(frames: Frames) -> np.ndarray:
    """Images or arrays as one uint8 array [T, H, W, 3].

    Raises TypeError or ValueError, naming the frame, for what is no video.
    """
    return np.stack([np.asarray(frame) for frame in rgb_frames(frames)])


def track_object(frames: Frames) -> Track:
    """Follow the largest object of a video with a camera at rest.

    frames: PIL images or uint8 [T, H, W, 3]. A pixel belongs to the object if it is at least half as far
    from the background's colours as the object is, so that a soft edge counts up to its middle.
    Raises TypeError or ValueError, naming the frame, for what is no video.
    """
    video = video_array(frames)
    far = distance_from_background(video)
    masks = largest_patches(far > LEAST_DISTANCE)
    if masks.any():
        masks = largest_patches(far > max(LEAST_DISTANCE, float(np.median(far[masks])) / 2))
    masks &= (masks.sum((1, 2)) >= LEAST_AREA * masks[0].size)[:, None, None]
    background = np.median(video[far <= LEAST_DISTANCE], axis=0)
    colour = np.median(video[masks], axis=0) if masks.any() else background
    found = masks.any((1, 2))
    return Track(
        centroids=_centroids(masks, found),
        found=found,
        masks=masks,
        colour=colour.astype(np.float32),
        background=background.astype(np.float32),
    )


def distance_from_background(video: np.ndarray) -> np.ndarray:
    """How far each pixel of uint8 [T, H, W, 3] is from the background's colour at any of its brightnesses:
    float32 [T, H, W], RGB distance from 0 to 441.
    """
    return _distance_to_shades(video.astype(np.float32), _background_colour(video))


def _distance_to_shades(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How far RGB pixels [..., 3] are from a colour [3] at any brightness within SHADES: float32 [...]."""
    shade = (pixels @ colour / max(float(colour @ colour), 1.0)).clip(*SHADES)
    rest = pixels - shade[..., None] * colour
    return np.sqrt(np.einsum("...c,...c->...", rest, rest))


def _background_colour(video: np.ndarray) -> np.ndarray:
    """The colour that, at some brightness, most pixels have: float32 [3]."""
    pixels = video[:, ::_SPARSE, ::_SPARSE].reshape(-1, 3).astype(np.float32)
    bins = (pixels // _BIN).astype(int) @ np.array([4096, 64, 1])
    names, counts = np.unique(bins, return_counts=True)
    candidates = [
        pixels[bins == name].mean(0) for name in names[np.argsort(-counts, kind="stable")[:_CANDIDATES]]
    ]
    near = [(_distance_to_shades(pixels, colour) < LEAST_DISTANCE).sum() for colour in candidates]
    return candidates[int(np.argmax(near))]


def largest_patches(masks: np.ndarray) -> np.ndarray:
    """The largest connected patch (also across corners) of each mask of bool [T, H, W]: bool [T, H, W]."""
    labels = _patch_labels(masks)
    areas = np.bincount(labels[masks], minlength=masks.size)
    out = np.zeros_like(masks)
    for t, (label, mask) in enumerate(zip(labels, masks, strict=True)):
        if mask.any():
            own = label[mask]
            out[t] = mask & (label == own[areas[own].argmax()])
    return out


def _patch_labels(masks: np.ndarray) -> np.ndarray:
    """An index of one of the pixels of its patch for each pixel of a mask, -1 elsewhere: int [T, H, W]."""
    labels = np.where(masks, np.arange(masks.size).reshape(masks.shape), -1)
    while True:
        spread = labels.copy()
        for axis in (1, 2):
            line = np.moveaxis(spread, axis, 0)
            larger = np.maximum(line[:-1], line[1:])
            np.maximum(line[:-1], larger, out=line[:-1])
            np.maximum(line[1:], larger, out=line[1:])
        # A label is a place in the same patch: going on to that place's label makes the way there short.
        spread = np.where(masks, spread.ravel()[spread], -1)
        if (spread == labels).all():
            return labels
        labels = spread


def _centroids(masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Means of mask pixels (row, column), filled in over time where there are none: float32 [T, 2]."""
    num_frames, height, width = masks.shape
    if not found.any():
        return np.tile(np.float32([height / 2, width / 2]), (num_frames, 1))
    areas = masks.sum((1, 2))[found]
    rows = masks[found].sum(2) @ (np.arange(height) + 0.5) / areas
    cols = masks[found].sum(1) @ (np.arange(width) + 0.5) / areas
    times = np.arange(num_frames)
    filled = [np.interp(times, times[found], values) for values in (rows, cols)]
    return np.stack(filled, axis=-1).astype(np.float32)
