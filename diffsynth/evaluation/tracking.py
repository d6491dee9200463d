"""Track the one object of a video by its colour, which differs from the background's in each frame.

A background of one colour, lit unevenly or checkered, is a stretch of a ray in RGB: its colour at different
brightness. The object is the largest connected patch that is far from it. No motion is assumed, so that a
video that does not follow its reference is tracked as well as one that does.
"""

from dataclasses import dataclass

import numpy as np

from diffsynth.data.frames import rgb_frames
from diffsynth.data.tensors import Video

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
    """An object's path through a video of T frames.

    Attributes:
        centroids: float32 [T, 2], (row, column) in pixels, the first pixel's centre at 0.5. Frames without
            the object have a position between their neighbours; without any, it is the picture's middle.
        found: bool [T], whether the frame shows the object.
        masks: bool [T, H, W], its pixels.
        colour: float32 [3], median RGB of its pixels over the video; the background's if it is never found.
        background: float32 [3], median RGB of all pixels that are near the background.
    """

    centroids: np.ndarray
    found: np.ndarray
    masks: np.ndarray
    colour: np.ndarray
    background: np.ndarray


def video_array(frames: Video) -> np.ndarray:
    """Return a video as uint8 [T, H, W, 3]; TypeError, ValueError that names a frame that is none."""
    return np.stack([np.asarray(frame) for frame in rgb_frames(frames)])


def track_object(frames: Video) -> Track:
    """Track the largest object of a video with a camera at rest.

    A pixel belongs to the object if it is at least half as far from the background's colours as the object
    is, so that a soft edge counts up to its middle.

    Args:
        frames: the video.

    Raises:
        TypeError, ValueError: a frame is none; the message names it.
    """
    video = video_array(frames)
    far = distance_from_background(video)
    masks = largest_patches(far > LEAST_DISTANCE)
    if masks.any():
        masks = largest_patches(far > max(LEAST_DISTANCE, float(np.median(far[masks])) / 2))
    masks &= (masks.sum((1, 2)) >= LEAST_AREA * masks[0].size)[:, None, None]
    background = np.median(video[far <= LEAST_DISTANCE], axis=0)
    colour = np.median(video[masks], axis=0) if masks.any() else background
    found = np.asarray(masks.any((1, 2)))
    return Track(
        centroids=_centroids(masks, found),
        found=found,
        masks=masks,
        colour=colour.astype(np.float32),
        background=background.astype(np.float32),
    )


def distance_from_background(video: np.ndarray) -> np.ndarray:
    """Return how far each pixel is from the background's colour at its nearest brightness.

    Args:
        video: uint8 [T, H, W, 3].

    Returns:
        float32 [T, H, W], distance in RGB from 0 to 441.
    """
    return _distance_to_shades(video.astype(np.float32), _background_colour(video))


def _distance_to_shades(pixels: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Return how far RGB pixels [..., 3] are from a colour [3] at its nearest brightness: float32 [...]."""
    shade = (pixels @ colour / max(float(colour @ colour), 1.0)).clip(*SHADES)
    rest = pixels - shade[..., None] * colour
    return np.sqrt(np.einsum("...c,...c->...", rest, rest))


def _background_colour(video: np.ndarray) -> np.ndarray:
    """Return the colour that, at some brightness, most pixels have: float32 [3]."""
    pixels = video[:, ::_SPARSE, ::_SPARSE].reshape(-1, 3).astype(np.float32)
    bins = (pixels // _BIN).astype(int) @ np.array([4096, 64, 1])
    names, counts = np.unique(bins, return_counts=True)
    candidates = [
        pixels[bins == name].mean(0) for name in names[np.argsort(-counts, kind="stable")[:_CANDIDATES]]
    ]
    near = [(_distance_to_shades(pixels, colour) < LEAST_DISTANCE).sum() for colour in candidates]
    return candidates[int(np.argmax(near))]


def largest_patches(masks: np.ndarray) -> np.ndarray:
    """Keep the largest connected patch (also across corners) of each mask: bool [T, H, W] -> the same."""
    labels = _patch_labels(masks)
    areas = np.bincount(labels[masks], minlength=masks.size)
    out = np.zeros_like(masks)
    for t, (label, mask) in enumerate(zip(labels, masks, strict=True)):
        if mask.any():
            own = label[mask]
            out[t] = mask & (label == own[areas[own].argmax()])
    return out


def _patch_labels(masks: np.ndarray) -> np.ndarray:
    """Label the pixels of a patch by the index of one of them, and others by -1: int [T, H, W]."""
    labels = np.where(masks, np.arange(masks.size).reshape(masks.shape), -1)
    while True:
        spread = labels.copy()
        for axis in (1, 2):
            line = np.moveaxis(spread, axis, 0)
            larger = np.maximum(line[:-1], line[1:])
            np.maximum(line[:-1], larger, out=line[:-1])
            np.maximum(line[1:], larger, out=line[1:])
        # A label is a place in the same patch: taking that place's label makes the way there short.
        spread = np.where(masks, spread.ravel()[spread], -1)
        if (spread == labels).all():
            return labels
        labels = spread


def _centroids(masks: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return means of mask pixels (row, column), interpolated where there are none: float32 [T, 2]."""
    num_frames, height, width = masks.shape
    if not found.any():
        return np.tile(np.array([height / 2, width / 2], np.float32), (num_frames, 1))
    areas = masks.sum((1, 2))[found]
    rows = masks[found].sum(2) @ (np.arange(height) + 0.5) / areas
    cols = masks[found].sum(1) @ (np.arange(width) + 0.5) / areas
    times = np.arange(num_frames)
    filled = [np.interp(times, times[found], values) for values in (rows, cols)]
    return np.stack(filled, axis=-1).astype(np.float32)
