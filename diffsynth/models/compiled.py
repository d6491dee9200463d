"""torch.compile, set up so that nothing falls back to uncompiled code in silence."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

VARIANTS = 256  # of compiled code: for each size, with and without gradients


@lru_cache
def compiled(function: Callable[..., Any], backend: str = "inductor", dynamic: bool | None = None) -> Any:
    """Return the compiled function, which compiles at its first call; if dynamic is None, for all sizes from
    the second one on."""
    limits = torch._dynamo.config  # its own limit of variants is eight
    limits.recompile_limit = max(limits.recompile_limit, VARIANTS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * VARIANTS)
    return torch.compile(function, backend=backend, dynamic=dynamic)
