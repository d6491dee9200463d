"""torch.compile for the DiT's blocks: one block is compiled, all of them run its code.

A block is one graph. Shapes are fixed (dynamic=False): a new size or window, and calls with gradients besides
those without, compile anew. What each of these warm-ups took is logged.
"""

import logging
import time
from collections.abc import Callable
from types import MethodType

import torch
from torch import Tensor

from diffsynth.models.compiled import compiled
from diffsynth.models.wan_video_dit import DiTBlock, DiTState, WanModel

logger = logging.getLogger(__name__)

Forward = Callable[[DiTBlock, Tensor, DiTState], Tensor]


def compile_blocks(dit: WanModel, backend: str = "inductor") -> None:
    """Have the forward pass of each block compiled at its first call; a second call changes nothing.

    Hooks on blocks run as before, outside of the compiled code, which may round differently.

    Raises:
        ValueError: torch does not know the backend.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ValueError(f"backend must be one of {', '.join(known)}; got {backend!r}")
    # The function of the class, so that blocks share its code, and not the module's call, whose hooks come
    # and go from run to run without compiled code noticing.
    run = _compiled(DiTBlock.forward, backend)
    for block in dit.blocks:
        if "forward" not in vars(block):
            block.forward = MethodType(run, block)


def _compiled(forward: Forward, backend: str) -> Forward:
    """The compiled function, which logs the seconds of calls that compiled anything."""
    run = compiled(forward, backend, dynamic=False)
    counters = torch._dynamo.utils.counters

    def timed(block: DiTBlock, tokens: Tensor, state: DiTState) -> Tensor:
        before, started = counters["stats"]["unique_graphs"], time.perf_counter()
        result = run(block, tokens, state)
        if (graphs := counters["stats"]["unique_graphs"] - before) > 0:
            seconds = time.perf_counter() - started
            logger.info("torch.compile (%s): %d graphs of a block in %.1f s", backend, graphs, seconds)
        return result

    return timed
