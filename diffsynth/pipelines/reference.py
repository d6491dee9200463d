"""The reference's frames as a run uses them: fitted, and laid onto the object of a picture."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import Video, picture_to_tensor, video_to_tensor, warn_of_reference
from diffsynth.planning.alignment import align, shift

logger = logging.getLogger(__name__)


def reference_pixels(
    video: Video | None, pictures: Sequence[Image.Image], run: RunOptions
) -> tuple[Tensor | None, RunOptions]:
    """Return the frames of a reference, and the options with the numbers of their alignment.

    Args:
        video: the reference; None without one.
        pictures: those of the run, the one that it begins with first.
        run: resolved options.

    Returns:
        Frames [1, 3, T, H, W] in [-1, 1]; None without a reference.
    """
    if video is None or run.motion is None:
        pixels = None if video is None else video_to_tensor(video, run.num_frames, run.height, run.width)
        return pixels, replace(run, align="none")
    pixels = video_to_tensor(video, run.num_frames, run.height, run.width)
    warn_of_reference(pixels)
    found = run.align
    if found == "object":
        found = align(pixels, picture_to_tensor(pictures[0], run.height, run.width)) if pictures else "none"
        if found is None:
            logger.warning(
                "the reference stays where it is: what moves in it, or the picture's object, does not stand "
                "out; where they are apart, align=(right, down, scale) lays one onto the other"
            )
    if found in (None, "none", (0.0, 0.0, 1.0)):
        return pixels, replace(run, align="none")
    right, down, scale = found
    logger.info(
        "the reference is moved %g pixels right and %g down and scaled by %g, onto the picture's object; "
        "align='none' leaves it",
        *(right, down, scale),
    )
    return shift(pixels, found), replace(run, align=found)
