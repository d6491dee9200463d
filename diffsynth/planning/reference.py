"""The reference's frames as a run uses them: fitted, looked at, and laid onto the object of a picture."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import Video, picture_to_tensor, video_to_tensor
from diffsynth.planning.alignment import align, shift

logger = logging.getLogger(__name__)

# Mean change between frames, in levels of 255.
STILL = 0.5  # at most: compression and rounding alone
LATE = 0.25  # of the frames; rest at the beginning that is longer is told
CUT = 12.0  # at least, and by CUT_JUMP more than in the frames around it
CUT_JUMP = 1.8


def reference_pixels(
    video: Video | None, pictures: Sequence[Image.Image], run: RunOptions
) -> tuple[Tensor | None, RunOptions]:
    """Return a reference [1, 3, T, H, W] in [-1, 1], if there is one, and options with its alignment."""
    unmoved = replace(run, align="none")
    if video is None:
        return None, unmoved
    pixels = video_to_tensor(video, run.num_frames, run.height, run.width)
    if run.motion is None:
        return pixels, unmoved
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
        return pixels, unmoved
    right, down, scale = found
    logger.info(
        "the reference is moved %g pixels right and %g down and scaled by %g, onto the picture's object; "
        "align='none' leaves it",
        *(right, down, scale),
    )
    return shift(pixels, found), replace(run, align=found)


def find_cuts(change: Tensor) -> list[int]:
    """Return the indices (0-based) of the frames at which another shot begins, by how much frames change."""
    found = []
    for index, value in enumerate(change.tolist()):
        around = torch.cat([change[max(0, index - 2) : index], change[index + 1 : index + 3]])
        if len(around) and value > max(CUT, CUT_JUMP * (1 + float(around.max()))):
            found.append(index + 1)
    return found


def warn_of_reference(pixels: Tensor) -> tuple[bool, list[int]]:
    """Log a warning for a reference [1, 3, T, H, W] without motion, late motion, or more than one shot.

    Returns:
        Whether nothing moves, and the indices of the frames at which another shot begins.
    """
    change = (pixels[0, :, :, ::4, ::4].mean(0) * 127.5).diff(dim=0).abs().mean((1, 2))
    still, cuts = len(change) > 0 and float(change.max()) < STILL, find_cuts(change)
    moving = [i + 1 for i, value in enumerate(change.tolist()) if value >= STILL and i + 1 not in cuts]
    if still:
        logger.warning("nothing moves in the reference: there is no motion to transfer")
    elif moving and moving[0] > LATE * len(change):
        logger.warning("nothing moves in the reference before frame %d; start leaves that out", moving[0])
    if cuts:
        logger.warning(
            "the reference has a cut at frame %s; motion is not followed over it; start and end pick a shot",
            ", ".join(map(str, cuts)),
        )
    return still, cuts
