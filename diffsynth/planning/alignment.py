"""Shift and scale a reference so that its moving object lies on the object of a picture.

Guidance transfers motion by position, so both objects must be in the same place.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffsynth.data.tensors import chunks_to_uint8
from diffsynth.planning.objects import LEAST_DISTANCE, distance_from_background, largest_patches

Alignment = tuple[float, float, float]  # pixels to the right, pixels down, scale about the picture's middle
_AREAS = (0.003, 0.3)  # minimum and maximum share of the picture that an object may cover
_LEAST_SHARE = 0.75  # minimum share of the foreground pixels that belong to the object
_MOST_BORDER = 0.1  # maximum share of the border pixels that an object may cover
_SCALES = (0.5, 2.0)
_SAME_SIZE = 1.25  # size ratios below this factor count as 1, since silhouettes differ
_SAME_PLACE = 1.0  # pixels


class Spot(NamedTuple):
    """An object's place: middle, in pixels from the top left corner, and square root of its area."""

    row: float
    column: float
    size: float


def align(pixels: Tensor, picture: Tensor) -> Alignment | None:
    """Return the map from what moves in a reference [1, 3, T, H, W] to the object of a picture [1, 3, H, W].

    Returns:
        (right, down, scale) for `shift`; None if one of the two objects is not found with confidence.
    """
    video = chunks_to_uint8([pixels], pixels.shape[2])
    from_rest = np.linalg.norm(video[:1] - np.median(video, axis=0), axis=-1)  # where the camera rests
    mover = _spot(distance_from_background(video, slice(1))) or _spot(from_rest)
    still = chunks_to_uint8([picture[:, :, None]], 1)
    turned = still.swapaxes(1, 2)
    shown = _spot(distance_from_background(still)) or _spot(_from_ends(still))
    shown = shown or _spot(_from_ends(turned).swapaxes(1, 2))
    if mover is None or shown is None:
        return None
    scale = min(max(shown.size / mover.size, _SCALES[0]), _SCALES[1])
    scale = 1.0 if 1 / _SAME_SIZE < scale < _SAME_SIZE else scale
    height, width = video.shape[1:3]
    right = shown.column - width / 2 - scale * (mover.column - width / 2)
    down = shown.row - height / 2 - scale * (mover.row - height / 2)
    if scale == 1 and max(abs(right), abs(down)) < _SAME_PLACE:
        return (0.0, 0.0, 1.0)
    return (round(float(right), 1), round(float(down), 1), round(float(scale), 2))


def shift(pixels: Tensor, alignment: Alignment) -> Tensor:
    """Return frames [1, 3, T, H, W], scaled about their middle and then moved.

    Pixels from outside take the temporal median's border values, so that no moving object is smeared.
    """
    right, down, scale = alignment
    height, width = pixels.shape[-2:]
    theta = torch.tensor([[1, 0, -2 * right / width], [0, 1, -2 * down / height]], dtype=pixels.dtype) / scale
    frames = pixels[0].transpose(0, 1)
    ground = torch.cat([frames, frames.median(dim=0, keepdim=True).values])
    grid = functional.affine_grid(theta.expand(len(ground), 2, 3), list(ground.shape), False)
    *moved, rest = functional.grid_sample(ground, grid, padding_mode="border", align_corners=False)
    inside = (grid[0].abs() <= 1).all(-1)
    return torch.where(inside, torch.stack(moved), rest).transpose(0, 1)[None].contiguous()


def _from_ends(picture: np.ndarray) -> np.ndarray:
    """Return how far each pixel is from the gradient between the ends of its row: float32 [1, H, W]."""
    rows = picture.astype(np.float32)
    share = np.linspace(0, 1, rows.shape[2], dtype=np.float32)[:, None]
    expected = rows[:, :, :1] * (1 - share) + rows[:, :, -1:] * share
    return np.sqrt(np.square(rows - expected).sum(-1))


def _spot(far: np.ndarray) -> Spot | None:
    """Return the object in a frame's distances from the background [1, H, W]; None unless it stands out."""
    differs = far > LEAST_DISTANCE
    mask = largest_patches(differs)[0]
    area = mask.mean()
    border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).mean()
    if not _AREAS[0] <= area <= _AREAS[1] or border > _MOST_BORDER:
        return None
    if mask.sum() < _LEAST_SHARE * differs.sum():
        return None
    rows, columns = np.nonzero(mask)
    return Spot(rows.mean() + 0.5, columns.mean() + 0.5, float(np.sqrt(mask.sum())))
