"""References unlike what the embedded picture model was trained on; their motion is known all the same.

Kinds: a sprite that was never trained on before a rough texture, a cut-out with a texture of its own before
another texture, and that with a camera that pans or zooms.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "train_nano"))
from sprite_package import HELD_OUT_SPRITES, sprite
from sprite_scenes import BEYOND, SUPERSAMPLING, camera_views, with_cut_out

from benchmarks.synthetic.clips import SyntheticClip
from benchmarks.synthetic.shapes import KNOWN_SHAPES, signed_distance

CAMERA_MOVE = "camera move"
KINDS = ("sprite before texture", "textured cut-out", CAMERA_MOVE)
_OCTAVES = range(
    2, 8
)  # cells a side of a texture: 4 to 128, each with half of the contrast of the one before
_CONTRAST = 55.0  # of the roughest octave, in levels of 255, about that of photographs
_SIDE = 96  # pixels of a cut-out, as those of a sprite


def texture(rng: np.random.Generator, side: int) -> Image.Image:
    """Return a square picture whose contrast falls with frequency, as photographs' does."""
    pixels = np.broadcast_to(rng.uniform(60, 195, 3), (side, side, 3))
    for octave in _OCTAVES:
        cells = rng.normal(0, _CONTRAST / 2 ** (octave - _OCTAVES[0]), (2**octave, 2**octave, 1))
        cells = (cells * rng.uniform(0.6, 1.4, 3)).astype(np.float32)
        channels = map(Image.fromarray, np.moveaxis(cells, -1, 0))
        large = [channel.resize((side, side), Image.Resampling.BICUBIC) for channel in channels]
        pixels = pixels + np.stack(large, axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_unlike_frames(seed: tuple[int, ...], kind: str, motion: SyntheticClip) -> np.ndarray:
    """Return frames uint8 [T, H, W, 3] of that kind whose object and camera move as those of `motion`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    rng = np.random.default_rng((8, *seed))
    height, width = motion.frames.shape[1:3]
    world = texture(rng, round(SUPERSAMPLING * min(height, width) * (1 + 2 * BEYOND)))
    if kind == KINDS[0]:
        image = sprite(str(rng.choice(HELD_OUT_SPRITES)))
    else:
        image = texture(rng, _SIDE)
        points = (np.moveaxis(np.mgrid[0:_SIDE, 0:_SIDE], 0, -1) + 0.5) / _SIDE * 2 - 1
        inside = signed_distance(str(rng.choice(KNOWN_SHAPES)), points) < 0
        image.putalpha(Image.fromarray(255 * inside.astype(np.uint8)))
    views = camera_views(world, motion.layers[0], height, width)
    shown = [with_cut_out(view, image, layer) for view, layer in zip(views, motion.layers[-1], strict=True)]
    return np.stack([np.asarray(picture.reduce(SUPERSAMPLING)) for picture in shown])
