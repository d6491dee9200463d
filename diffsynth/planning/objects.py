"""Find an object before its background: by colour, and by connected patches.

A background of one colour, lit unevenly or checkered, is a stretch of a ray in RGB: its colour at different
brightness.
"""

import numpy as np

# A background's brightness against its most frequent one; the generated backgrounds span 0.72 to 1.39.
SHADES = (0.65, 1.45)
# Distances in RGB, 0 to 441. What is nearer to the background is background, whatever the object's colour.
LEAST_DISTANCE = 30.0
LEAST_AREA = 0.005  # of the picture, of an object
_BIN = 16  # RGB levels that count as one colour when the background is looked for
_CANDIDATES = 12
_SPARSE = 2  # rows and columns between the pixels that are looked at for it


def distance_from_background(video: np.ndarray, frames: slice = slice(None)) -> np.ndarray:
    """Return how far in RGB [t, H, W] frames of a video, uint8 [T, H, W, 3], are from its background."""
    return _distance_to_shades(video[frames].astype(np.float32), _background_colour(video))


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
    out = np.zeros_like(masks)
    for kept, mask in zip(out, masks, strict=True):
        if mask.any():
            labels = _patch_labels(mask)
            own = labels[mask]
            kept[:] = labels == own[np.bincount(own)[own].argmax()]
    return out


def _patch_labels(mask: np.ndarray) -> np.ndarray:
    """Label the pixels of a patch by the index of one of them, and others by -1: int [H, W]."""
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        spread = labels.copy()
        for line in (spread, spread.T):
            larger = np.maximum(line[:-1], line[1:])
            np.maximum(line[:-1], larger, out=line[:-1])
            np.maximum(line[1:], larger, out=line[1:])
        # A label is a place in the same patch: taking that place's label makes the way there short.
        spread = np.where(mask, spread.ravel()[spread], -1)
        if (spread == labels).all():
            return labels
        labels = spread
