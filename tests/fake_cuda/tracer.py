"""What the package would do on a CUDA device, watched without one: tensors that have sizes but no data.

Needs `guard.cpp`, loaded before PyTorch (see tests/test_fake_cuda.py). Everything between the package and the
kernels is real; kernels are chosen as PyTorch chooses them on a card of compute capability 8.0 or higher.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from memory_meter import MemoryMeter, forget_tables
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffsynth.models import attention, checkpointing, compiled
from diffsynth.vram_management import residency
from diffsynth.vram_management.streaming import ImmediateCopies

ATEN = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
DOUBLE = (torch.float64, torch.complex128)
# Operations whose result has a size that the device alone knows, so that the CPU must wait for it.
READS_SIZE = ("nonzero", "masked_select", "_unique2", "unique_consecutive", "equal")


class Trace(MemoryMeter):
    """Counts what an accelerator would be asked for inside this context.

    Attributes:
        live, peak: bytes of tensors on it now, and at most, as in `MemoryMeter`.
        flops: operations of products, convolutions and attention.
        waits: place -> how often the CPU waited there for the device: numbers that were read, and copies that
            were not asked to run beside the program.
        doubles: place -> operations there on the device in 64-bit floating point.
        devices: names of the devices on which anything was made.
        math_attention: calls of attention that no fused kernel serves.
        moved: bytes that all other operations read and write; of a fused function, its inputs and results.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.math_attention = self.moved = self._inside = 0
        self.waits: Counter[str] = Counter()
        self.doubles: Counter[str] = Counter()
        self.devices: set[str] = set()

    def restart(self) -> None:
        """Begin to count anew; tensors that are alive stay counted."""
        super().restart()
        self.flops = self.math_attention = self.moved = 0
        self.waits.clear()
        self.doubles.clear()
        self.devices.clear()

    def wait(self, kind: str) -> None:
        """Count a moment at which the CPU waits for the device."""
        self.waits[f"{kind} {place()}"] += 1

    def as_one(self, function: Any) -> Any:
        """Return the function with all its operations counted as one kernel."""

        def run(*inputs: Any, **named: Any) -> Any:
            self._inside += 1
            try:
                result = function(*inputs, **named)
            finally:
                self._inside -= 1
            self._move(inputs, named, result)
            return result

        return run

    def _move(self, *values: Any) -> None:
        if not self._inside:
            tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_cuda]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)

    def room(self, size: int) -> None:
        """Count work space that a kernel takes and hands back."""
        self.peak = max(self.peak, self.live + size)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, operation = function._overloadpacket.__name__, function._overloadpacket
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if inputs and not any(isinstance(x, FakeTensor) for x in inputs) and not _names_cuda(kwargs):
            with unset_fake_temporarily():  # tables on the CPU, such as a scheduler's
                return function(*args, **kwargs)
        if name == "_local_scalar_dense":
            if inputs[0].is_cuda:
                self.wait("numbers read")
            return {torch.bool: True}.get(inputs[0].dtype, 1.0 if inputs[0].is_floating_point() else 1)
        if name in READS_SIZE and inputs[0].is_cuda:
            self.wait(name)
        given = {x.untyped_storage()._cdata for x in inputs}
        result = function(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._watch_copies(name, args, kwargs, inputs, outputs)
        for out in outputs:
            if out.is_cuda:
                self.devices.add(str(out.device))
                if out.dtype in DOUBLE:
                    self.doubles[f"{name} {place()}"] += 1
                if out.untyped_storage()._cdata not in given:
                    self.add(out)
        views = all(x.untyped_storage()._cdata in given for x in outputs) and not function._schema.is_mutable
        if operation not in flop_registry and not views and not name.startswith(("empty", "new_empty")):
            self._move(args, kwargs, result)
        if operation in flop_registry:
            self.flops += flop_registry[operation](*args, **kwargs, out_val=result)
        if name == "_scaled_dot_product_flash_attention_backward":
            self.room(4 * args[1].numel())  # the kernel adds up the queries' gradient in float32
        if name == "_scaled_dot_product_attention_math" and inputs[0].is_cuda:
            self.math_attention += 1
        return result

    def _watch_copies(
        self, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], outputs[0]) if name == "_to_copy" else (args[1], args[0])
            beside = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            if source.device.type != target.device.type and not beside:
                self.wait("copy to the device" if target.is_cuda else "copy to the CPU")
        if name in ("index", "index_put", "index_put_", "_unsafe_index") and inputs[0].is_cuda:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not index.is_cuda):
                    self.wait("index by a mask" if index.dtype == torch.bool else "index from the CPU")


def place() -> str:
    """Return file and line of the innermost frame of the package."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "/diffsynth/" in path:
            return f"{path.rsplit('/diffsynth/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _names_cuda(kwargs: dict) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"


_sdpa = F.scaled_dot_product_attention


def cuda_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
    """Call the kernel that PyTorch takes on a card: flash, else the memory-efficient one, else none."""
    scale = more.get("scale")
    if not q.is_cuda:
        return _sdpa(q, k, v, attn_mask=attn_mask, **more)
    if q.dtype in HALF and attn_mask is None and q.shape[-1] <= 256 and q.shape[-1] == v.shape[-1]:
        return ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]
    step = 8 if q.dtype in HALF else 4
    if q.dtype == torch.float64 or q.shape[-1] % step or v.shape[-1] % step:
        return ATEN._scaled_dot_product_attention_math(q, k, v, attn_mask, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill_(~attn_mask, -torch.inf)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return ATEN._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, needs_grad, 0.0, False, scale=scale
    )[0]


class CopiesBeside(ImmediateCopies):
    """Copies that do not keep the program waiting, as those of page-locked weights."""

    def __init__(self, _device: torch.device) -> None:
        pass

    def start(self, into: Any, source: Any, after: Any) -> Any:  # noqa: ARG002
        for target, tensor in zip(into, source, strict=True):
            target.copy_(tensor, non_blocking=True)


@contextmanager
def traced(fuse: bool = False) -> Iterator[Trace]:
    """Inside this context "cuda:0" and "cuda:1" take tensors, which have no data, and all is counted.

    With `fuse`, functions that would be compiled on a card count as one kernel, but are run as written.

    Replaced is only what needs a driver: page-locking, streams, and how many bytes are free. Inputs of blocks
    that wait on the CPU are forgotten there and made again.
    """
    data = Tensor.data

    def set_data(tensor: FakeTensor, other: Tensor) -> None:
        data.__set__(tensor, other)
        if isinstance(other, FakeTensor):
            tensor.fake_device = other.fake_device

    with ExitStack() as stack:
        forget_tables()
        stack.callback(forget_tables)
        for target, name, new in (
            (F, "scaled_dot_product_attention", cuda_attention),
            (checkpointing, "to_host", lambda t: (t.shape, t.dtype, t.device)),
            (checkpointing, "to_device", lambda k: torch.empty(k[0], dtype=k[1], device=k[2])),
            (residency, "page_lock", lambda _: True),
            (residency, "SideStreamCopies", CopiesBeside),
            (torch.cuda, "empty_cache", lambda: None),
            (attention, "capability", lambda device: (8, 0) if device == "cuda" else (0, 0)),
            (nn.Module, "to", lambda module, *_: module),  # of models that are on the CPU
            (np, "concatenate", lambda arrays: arrays[0]),
        ):
            stack.enter_context(patch.object(target, name, new))
        stack.enter_context(patch.object(FakeTensor, "data", property(data.__get__, set_data), create=True))
        stack.enter_context(patch.object(FakeTensor, "numpy", lambda _: np.zeros(1), create=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        trace = Trace()
        stack.enter_context(patch.object(compiled, "can_fuse", lambda _: fuse))
        stack.enter_context(patch.object(compiled, "compiled", trace.as_one))
        stack.enter_context(patch.object(F, "rms_norm", trace.as_one(F.rms_norm)))

        def read_all(tensor: FakeTensor) -> list[float]:
            trace.wait("numbers read")  # all in one copy
            return [1.0] * tensor.numel()

        stack.enter_context(patch.object(FakeTensor, "tolist", read_all, create=True))
        yield stack.enter_context(trace)
