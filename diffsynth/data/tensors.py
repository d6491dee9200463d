"""Between frames as people have them and the tensors that the VAE reads and writes."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.data import VideoData, fit_frame
from diffsynth.data.frames import rgb_frames

Video = VideoData | Sequence[Image.Image] | np.ndarray


def frame_size(video: Video) -> tuple[int, int]:
    """(height, width) of a reference video.

    Raises TypeError if it is not a VideoData, a sequence of PIL images or uint8 arrays [H, W, 3], or one
    uint8 array [T, H, W, 3]; ValueError if it has no frames.
    """
    if isinstance(video, VideoData):
        return video.shape()
    if isinstance(video, str) or not isinstance(video, Sequence | np.ndarray):
        raise TypeError(
            f"input_video must be a VideoData, images or a uint8 array; got {type(video).__name__}"
        )
    first = next(rgb_frames(video[:1]))
    return first.height, first.width


def video_to_tensor(video: Video | None, num_frames: int, height: int, width: int) -> Tensor | None:
    """Return the first frames, centre-cropped and resized where needed; None without a video.

    Returns:
        [1, 3, T, H, W] in [-1, 1], float32 on the CPU.
    """
    if video is None:
        return None
    out = torch.empty(1, 3, num_frames, height, width)
    frames = video if isinstance(video, VideoData) else rgb_frames(video)
    for index, frame in enumerate(islice(frames, num_frames)):
        pixels = torch.from_numpy(np.array(fit_frame(frame, height, width)))
        out[0, :, index] = pixels.permute(2, 0, 1)
    return out.mul_(2 / 255).sub_(1)


def chunks_to_uint8(chunks: Iterable[Tensor], num_frames: int) -> np.ndarray:
    """Decoded chunks [1, 3, t, H, W] in [-1, 1] -> the first frames, rounded, uint8 [T, H, W, 3].

    Chunk by chunk, so that no more than one is held in floating point.
    """
    frames: list[np.ndarray] = []
    for chunk in chunks:
        pixels = ((chunk[0] + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
        frames.append(pixels.permute(1, 2, 3, 0).cpu().numpy())
    return np.concatenate(frames)[:num_frames]
