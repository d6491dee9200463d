"""The clips with known motion of `benchmarks/synthetic`, for scripts that are started from anywhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.synthetic.clips import (
    BACKGROUND_TEXTURES,
    COLOURS,
    OBJECT_TEXTURES,
    SHAPES,
    SceneOptions,
    SyntheticClip,
    make_clip,
)
from benchmarks.synthetic.shapes import signed_distance

__all__ = [
    "BACKGROUND_TEXTURES",
    "COLOURS",
    "OBJECT_TEXTURES",
    "SHAPES",
    "SceneOptions",
    "SyntheticClip",
    "make_clip",
    "signed_distance",
]
