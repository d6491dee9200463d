"""Frames to the tensors that the VAE reads, and back."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.data import VideoData, fit_frame
from diffsynth.data.frames import rgb_frames, warn_of_cropping

Video = VideoData | Sequence[Image.Image] | np.ndarray


def frame_size(video: Video) -> tuple[int, int]:
    """Return (height, width) of a reference video.

    Raises:
        TypeError: it is not a VideoData, PIL images, uint8 arrays [H, W, 3], or a uint8 array [T, H, W, 3].
        ValueError: it has no frames.
    """
    if isinstance(video, VideoData):
        return video.shape()
    if isinstance(video, str) or not isinstance(video, Sequence | np.ndarray):
        raise TypeError(f"input_video must be VideoData, images or a uint8 array; got {type(video).__name__}")
    first = next(rgb_frames(islice(video, 1), "input_video"))
    return first.height, first.width


def video_to_tensor(video: Video, num_frames: int, height: int, width: int) -> Tensor:
    """Return the first frames, fitted as the video says: [1, 3, T, H, W] in [-1, 1], float32 on the CPU."""
    out = torch.empty(1, 3, num_frames, height, width, dtype=torch.float32)
    frames = video if isinstance(video, VideoData) else rgb_frames(video, "input_video")
    fit = video.fit if isinstance(video, VideoData) else "crop"
    for index, frame in enumerate(islice(frames, num_frames)):
        if index == 0 and fit == "crop":
            warn_of_cropping(frame.size, (width, height))
        pixels = torch.from_numpy(np.array(fit_frame(frame, height, width, fit)))
        out[0, :, index] = pixels.permute(2, 0, 1)
    return out.mul_(2 / 255).sub_(1)


def picture_to_tensor(picture: Image.Image, height: int | None = None, width: int | None = None) -> Tensor:
    """Return a picture as [1, 3, H, W] in [-1, 1], cropped and resized to a size if one is given."""
    return video_to_tensor([picture], 1, height or picture.height, width or picture.width)[:, :, 0]


def finite(values: Tensor, maker: str) -> Tensor:
    """Return values that a model, named by `maker`, made.

    Raises:
        RuntimeError: a value is not finite; the message says what to try.
    """
    if not values.isfinite().all():
        raise RuntimeError(
            f"{maker} gave values that are not finite; try float32, weights without LoRAs, or options that "
            "are nearer to their defaults"
        )
    return values


def chunks_to_uint8(chunks: Iterable[Tensor], num_frames: int) -> np.ndarray:
    """Convert decoded chunks [1, 3, t, H, W] in [-1, 1] to their first frames, rounded, uint8 [T, H, W, 3].

    Chunks are converted one by one, so that only one is held in floating point.
    """
    frames: list[np.ndarray] = []
    for chunk in chunks:
        pixels = ((chunk[0] + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        frames.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
    return np.concatenate(frames)[:num_frames]
