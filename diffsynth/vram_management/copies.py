"""Copies of weights to the compute device while it computes, for a CPU and for a CUDA device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Mark = Any  # a point in a device's queue of work; what it is, only the copies that gave it know


class ImmediateCopies:
    """Copies on a CPU, done when `start` returns; also the interface of asynchronous copies."""

    def start(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark | None) -> Mark:  # noqa: ARG002
        """Copy each tensor once the work up to `after` is done; the mark is where the copies are."""
        for target, tensor in zip(into, source, strict=True):
            target.copy_(tensor)

    def wait(self, copied: Mark) -> None:
        """Work that is given from now on begins after these copies."""

    def mark(self) -> Mark:
        """Return a mark of the end of the work so far."""

    def finish(self) -> None:
        """Work that is given from now on begins after all copies."""


class SideStreamCopies(ImmediateCopies):
    """Copies on a separate CUDA stream; events order both streams, and nobody waits on the
    CPU. Source tensors should be page-locked: copies of others stop the caller."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def start(self, into: Sequence[Tensor], source: Sequence[Tensor], after: Mark | None) -> Mark:
        # Without a mark, everything given so far: the memory may still be in use for something else.
        self._side.wait_event(self.mark() if after is None else after)
        with torch.cuda.stream(self._side):
            for target, tensor in zip(into, source, strict=True):
                target.copy_(tensor, non_blocking=True)
            return self._side.record_event()

    def wait(self, copied: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(copied)

    def mark(self) -> Mark:
        return torch.cuda.current_stream(self._device).record_event()

    def finish(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._side)
