"""The reference's frames as a run uses them: fitted, looked at, and laid onto the object of a picture."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffsynth.configs.options import RunOptions
from diffsynth.data import VideoData
from diffsynth.data.tensors import Video, picture_to_tensor, video_to_tensor
from diffsynth.planning.alignment import align, shift
from diffsynth.planning.objects import LEAST_AREA, LEAST_DISTANCE

logger = logging.getLogger(__name__)

# Mean change between frames, in levels of 255.
STILL = 0.5  # at most: compression and rounding alone
LATE = 0.25  # of the frames; rest at the beginning that is longer is told
CUT = 12.0  # at least, and by CUT_JUMP more than in the frames around it
CUT_JUMP = 1.8
SIDE, GRID = 64, 32  # pixels of the shorter side at which a reference is looked at, and rows for its camera
# A camera's move leaves at most so much of the change unexplained (six real clips: 0.20 and more), and
# changes the picture so evenly (clips of one object: 0.42 and less; normally distributed changes: 0.64).
UNEXPLAINED, EVENLY = 0.15, 0.5


def reference_pixels(
    video: Video | None, pictures: Mapping[str, Image.Image], run: RunOptions
) -> tuple[Tensor | None, RunOptions]:
    """Return a reference [1, 3, T, H, W] in [-1, 1], if there is one, and options with its alignment."""
    unmoved = replace(run, align="none")
    if video is None:
        return None, unmoved
    pixels = video_to_tensor(video, run.num_frames, run.height, run.width)
    if run.motion is None:
        return pixels, unmoved
    warn_of_reference(pixels, video.fps if isinstance(video, VideoData) else None)
    found, first = run.align, pictures.get("input_image")
    if found == "object":
        found = "none" if first is None else align(pixels, picture_to_tensor(first, run.height, run.width))
        if found is None:
            logger.warning(
                "the reference stays where it is: what moves in it, or the picture's object, does not stand "
                "out; where they are apart, align=(right, down, scale) lays one onto the other"
            )
    if found in (None, "none", (0.0, 0.0, 1.0)):
        return pixels, unmoved
    logger.info(
        "the reference is moved %g pixels right and %g down and scaled by %g, onto the picture's object; "
        "align='none' leaves it",
        *found,
    )
    return shift(pixels, found), replace(run, align=found)


def camera_only(levels: Tensor) -> bool:
    """Return whether one affine motion of all pixels, a pan or a zoom, explains how [3, T, H, W] changes.

    Changes are fitted, by least squares, to the picture's slopes down and right, alone and times the place.
    """
    small = functional.interpolate(levels.mean(0)[:, None], (GRID, GRID), mode="area").double()
    small = functional.avg_pool2d(small, 5, 1)[:, 0]
    change, place = small.diff(dim=0).flatten(1), torch.linspace(-1, 1, small.shape[-1])
    slopes = torch.gradient((small[1:] + small[:-1]) / 2, dim=(1, 2))
    terms = torch.stack([a * b for a in slopes for b in (1, place, place[:, None])], dim=-1).flatten(1, 2)
    rest = change - (terms @ torch.linalg.lstsq(terms, change[..., None]).solution)[..., 0]
    shares = torch.stack([rest.square().mean(1), change.abs().mean(1).square()])
    unexplained, evenly = (shares / change.square().mean(1).clamp_min(1e-9)).median(1).values
    return bool(unexplained < UNEXPLAINED and evenly > EVENLY)


def comes_in(levels: Tensor) -> int:
    """Return the frame of [3, T, H, W], 0 to 255, in which what moves comes in over the edge; else 0."""
    away = (levels - levels.median(dim=1, keepdim=True).values).norm(dim=0) > LEAST_DISTANCE
    share = away.flatten(1).float().mean(1)
    start = int((share >= share.max() / 4).nonzero()[0])
    at_edge = away[start].sum() > away[start, 4:-4, 4:-4].sum()
    return start if at_edge and share.max() > LEAST_AREA and share[0] < share.max() / 10 else 0


def warn_of_reading(frame: Tensor, again: Tensor, least: float) -> None:
    """Log a warning if the VAE's reconstruction `again` of a reference's frame has less than `least` dB."""
    error = (again.float().cpu().clamp(-1, 1) - frame).square().mean() / 4
    if (found := -10 * float(torch.log10(error + 1e-10))) < least:
        logger.warning(
            "the model cannot read this reference: its VAE gives the first frame back at %.1f dB, and %g are "
            "needed; photographs and real clips take a published model (fastvmt download)",
            *(found, least),
        )


def warn_of_reference(pixels: Tensor, fps: float | None = None) -> tuple[bool, list[int]]:
    """Log a warning for a reference [1, 3, T, H, W] that guidance cannot follow, with times if fps is known.

    Nothing moves, or it is late, or what moves is not there at first, or only the camera, or there are cuts.

    Returns:
        Whether nothing moves, and the indices of the frames at which another shot begins.
    """
    step = max(1, min(pixels.shape[-2:]) // SIDE)
    levels = (pixels[0, :, :, ::step, ::step] + 1) * 127.5
    change = levels.mean(0).diff(dim=0).abs().mean((1, 2))
    padded = functional.pad(change, (2, 2))
    beside = torch.stack([padded[at : at + len(change)] for at in (0, 1, 3, 4)]).amax(0)
    sudden = (change > CUT) & (change > CUT_JUMP * (1 + beside)) & (len(change) > 1)
    still, cuts = len(change) > 0 and float(change.max()) < STILL, [int(at) + 1 for at in sudden.nonzero()]
    moving = [i + 1 for i, value in enumerate(change.tolist()) if value >= STILL and i + 1 not in cuts]
    late = bool(moving) and moving[0] > max(1, LATE * len(change))
    if still:
        logger.warning("nothing moves in the reference: there is no motion to transfer")
    elif moving and (start := moving[0] if late else not cuts and comes_in(levels)):
        what = "nothing moves" if late else "what moves is not yet"
        when = f"frame {start}" if fps is None else f"frame {start} ({start / fps:.1f} s)"
        logger.warning("%s in the reference before %s; start leaves that out", what, when)
    elif moving and not cuts and camera_only(levels):
        logger.warning("only the camera moves in the reference: what is transferred is its pan or zoom")
    if cuts:
        shown = ", ".join(map(str, cuts))
        logger.warning("the reference has a cut at frame %s; start and end pick a shot to follow", shown)
    return still, cuts
