"""Pictures of motion flow: a colour for each direction, arrows over the frames.

Flow is (rows, columns) in tokens: where a token of one latent frame is found in the next.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from diffsynth.data import fit_frame, save_video

PIXELS_PER_TOKEN = 16
ARROW_COLOUR = (255, 255, 255)


def flow_to_image(flow: Tensor | np.ndarray, largest: float | None = None) -> Image.Image:
    """Colour wheel picture of a flow [H, W, 2]: hue is direction, strength is length, white is no motion.

    largest: the length, in tokens, that gets full colour; by default the longest in this flow.
    Right is red, down is yellow-green, left is cyan, up is violet. Raises ValueError for another shape or
    values that are not finite.
    """
    flow = _checked(flow, 3)
    length = np.linalg.norm(flow, axis=-1)
    largest = max(length.max() if largest is None else largest, 1e-6)
    hue = np.arctan2(flow[..., 0], flow[..., 1]) / (2 * np.pi) % 1
    strength = np.clip(length / largest, 0, 1)
    hsv = np.stack([hue * 255, strength * 255, np.full_like(hue, 255)], axis=-1)
    return Image.fromarray(hsv.round().astype(np.uint8), mode="HSV").convert("RGB")


def save_flow_video(
    amf: Tensor | np.ndarray,
    path: str | Path,
    *,
    sf: int = 4,
    frames: Sequence[Image.Image] | None = None,
    fps: float = 15,
) -> Path:
    """Write a video of an attention motion flow: what will be transferred.

    amf: [P, H, W, 2] over the pairs i <= j < i + sf of F latent frames, as `attention_motion_flow` gives it.
    Shown is the flow from each latent frame to the next, as colours and arrows, beside the reference's
    frames if they are given (4 (F - 1) + 1 of them, or fewer), else alone, one picture a latent frame.
    Returns the path. Raises ValueError if P does not fit sf, or there is only one latent frame.
    """
    amf = _checked(amf, 4)
    steps = amf[_pairs_to_next(len(amf), sf)]
    largest = float(np.percentile(np.linalg.norm(steps, axis=-1), 99))
    pictures = [_with_arrows(flow_to_image(step, largest), step) for step in steps]
    shown = pictures if frames is None else _beside(frames, pictures, steps)
    return save_video(shown, path, fps=fps, quality=8)


def _checked(flow: Tensor | np.ndarray, ndim: int) -> np.ndarray:
    array = (
        flow.detach().float().cpu().numpy()
        if isinstance(flow, torch.Tensor)
        else np.asarray(flow, np.float32)
    )
    if array.ndim != ndim or array.shape[-1] != 2 or 0 in array.shape:
        axes = {3: "[H, W, 2]", 4: "[P, H, W, 2]"}[ndim]
        raise ValueError(f"flow must be {axes}; got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError("flow has values that are not finite")
    return array


def _pairs_to_next(num_pairs: int, sf: int) -> list[int]:
    """Places of the pairs (i, i + 1) among the pairs i <= j < i + sf, in order of i, then j."""
    places, place, num_frames = [], 0, 1
    while sum(min(sf, num_frames - i) for i in range(num_frames)) < num_pairs:
        num_frames += 1
    counts = [min(sf, num_frames - i) for i in range(num_frames)]
    if sum(counts) != num_pairs or num_frames < 2 or sf < 2:
        raise ValueError(f"{num_pairs} pairs do not make a flow of two or more latent frames with sf={sf}")
    for count in counts[:-1]:
        places.append(place + 1)
        place += count
    return places


def _with_arrows(
    picture: Image.Image, flow: np.ndarray, colour: tuple[int, int, int] = (40, 40, 40)
) -> Image.Image:
    """The picture at PIXELS_PER_TOKEN pixels a token, with an arrow for about every third token."""
    height, width = flow.shape[:2]
    canvas = picture.resize((width * PIXELS_PER_TOKEN, height * PIXELS_PER_TOKEN), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(canvas)
    every = max(1, round(max(height, width) / 16))
    for row in range(every // 2, height, every):
        for col in range(every // 2, width, every):
            start = ((col + 0.5) * PIXELS_PER_TOKEN, (row + 0.5) * PIXELS_PER_TOKEN)
            drow, dcol = flow[row, col] * PIXELS_PER_TOKEN
            end = (start[0] + dcol, start[1] + drow)
            draw.line([start, end], fill=colour, width=2)
            draw.ellipse([end[0] - 3, end[1] - 3, end[0] + 3, end[1] + 3], fill=colour)
    return canvas


def _beside(
    frames: Sequence[Image.Image], pictures: Sequence[Image.Image], steps: np.ndarray
) -> Iterator[Image.Image]:
    """Each frame with its arrows, and to its right the colours of the latent frame that it belongs to."""
    height, width = steps.shape[1:3]
    for index, frame in enumerate(frames):
        # The first frame is a latent frame of its own, then four make one.
        latent = min(-(-index // 4), len(pictures) - 1)
        small = fit_frame(frame, height * PIXELS_PER_TOKEN, width * PIXELS_PER_TOKEN)
        left, right = _with_arrows(small, steps[latent], ARROW_COLOUR), pictures[latent]
        both = Image.new("RGB", (left.width + right.width, left.height))
        both.paste(left, (0, 0))
        both.paste(right, (left.width, 0))
        yield both
