"""Small tensors that every gradient needs again, made once for each device.

A copy of a few numbers from the CPU would wait until the device has done all its work.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # a kept table must also serve calls with gradients
def table(values: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return (nested) tuples of numbers as a tensor that must not be changed in place."""
    return torch.tensor(values, dtype=dtype, device=device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def positions(rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return (row, column) of each token of a grid, [rows * cols, 2], not to be changed in place."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, 1).to(device, dtype)
