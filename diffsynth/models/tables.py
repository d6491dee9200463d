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
