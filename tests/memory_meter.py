"""Peak memory of tensors, counted: what an accelerator would report, on any machine and without its memory.

`fake_device` stands for the accelerator: tensors made inside it have sizes but no numbers, so that a pass of
a 14B model at full size takes seconds and no memory. It is what the memory model is checked against.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.models import checkpointing
from diffsynth.models.local_attention import tile_plan
from diffsynth.models.tables import positions, table
from diffsynth.models.wan_video_dit_layers import rotary_table

_ATEN = torch.ops.aten


class MemoryMeter(TorchDispatchMode):
    """Inside this context, counts the bytes of all storages that come to be: `live` now, `peak` at most.

    A storage counts once, however many tensors look at it, until the last of them is gone, autograd's among
    them. Storages made before count only by `add`. Numbers that are read from a fake tensor are 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage from now on, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is _ATEN._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = function(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                self.add(tensor)
        return out


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside this context new weights are of a dtype; fake ones cannot be converted later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forget_tables() -> None:
    """Forget what the code keeps from call to call: without data it is of no use to others."""
    for cache in (rotary_table, tile_plan, table, positions):
        cache.cache_clear()


@contextmanager
def fake_device() -> Iterator[MemoryMeter]:
    """Inside this context tensors have no numbers, and the meter counts them as on an accelerator.

    What is offloaded to the CPU does not count while it is there.
    """
    forget_tables()
    try:
        with (
            patch.object(checkpointing, "to_host", lambda tensor: (tensor.shape, tensor.dtype)),
            patch.object(checkpointing, "to_device", lambda kept: torch.empty(kept[0], dtype=kept[1])),
            FakeTensorMode(),
            MemoryMeter() as meter,
        ):
            yield meter
    finally:
        forget_tables()
