"""Wrappers of torch.compile; on CUDA, functions marked `fused` are compiled without being asked for.

Uncompiled, the operations between a block's matrix products move three times as many bytes as needed.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@lru_cache
def compiled(function: Callable[..., Any], backend: str = "inductor", dynamic: bool | None = None) -> Any:
    """Return the function, compiled at its first call; with dynamic=None, a second size compiles for all."""
    limits = torch._dynamo.config  # eight variants by default; further sizes would run uncompiled
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(function, backend=backend, dynamic=dynamic)


@lru_cache
def can_fuse(device: torch.device) -> bool:
    """Return whether compiled code runs on a CUDA device. The result is cached; a failure is logged."""
    try:
        if find_spec("triton") is not None:
            compiled(torch.square)(torch.ones(16, device=device)).sum().item()
            return True
    except Exception as error:  # noqa: BLE001 - whatever Triton and its compiler may raise
        logger.warning("passes are not fused, because torch.compile fails: %s", str(error).strip()[:300])
    return False


def fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function at its first call on CUDA; its second argument must be a tensor.

    Not compiled under deterministic algorithms: code for all sizes may round differently from code for one.
    """

    @wraps(function)
    def run(first: Any, x: Tensor, *inputs: Any, **named: Any) -> Tensor:
        fuse = not torch.compiler.is_compiling() and runs_fused(x)
        return (compiled(function) if fuse else function)(first, x, *inputs, **named)

    return run


def runs_fused(x: Tensor) -> bool:
    """Return whether fused functions of this tensor are compiled."""
    return x.is_cuda and not torch.are_deterministic_algorithms_enabled() and can_fuse(x.device)
