"""What the benchmarks measure of one call: peak memory and floating point operations."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from diffsynth.models.attention import use_attention
from diffsynth.vram_management import peak_memory, reset_peak_memory, synchronize

_ATEN = torch.ops.aten
MIB = 2**20
# Environment of a process whose resident memory is measured: glibc gives freed memory back at once.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}


def peak_increase(call: Callable[[], object], device: torch.device) -> int:
    """Bytes by which memory rises at most during `call`: allocated on an accelerator, resident on a CPU.

    On a CPU measure one call a process: memory that an earlier call has freed may serve this one unseen.
    """
    if device.type == "cpu":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the high-water mark
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before
    synchronize(device)
    reset_peak_memory(device)
    before = peak_memory(device)
    call()
    synchronize(device)
    return peak_memory(device) - before


def _status(name: str) -> int:
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


class FlopCounter(TorchDispatchMode):
    """Inside this context, counts the operations of products, convolutions and attention, backward included.

    PyTorch's own counter does not know the CPU's attention kernel and cannot watch `torch.autograd.grad`.
    On the meta device, where nothing can be read, every number that is asked for reads as 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is _ATEN._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype).item()
        if (
            function is _ATEN._to_copy.default
            and args[0].is_meta
            and kwargs.get("device") == torch.device("cpu")
        ):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        out = function(*args, **kwargs)
        operation = function._overloadpacket
        if operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=out)
        elif operation is _ATEN._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif operation is _ATEN._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        return out


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of one call, with attention by PyTorch, as the counter knows no other."""
    with use_attention("sdpa"), FlopCounter() as counter:
        call()
    return counter.total
