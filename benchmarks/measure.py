"""What the benchmarks measure of one call: peak memory and floating point operations."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

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


def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of products, convolutions and attention during `call`, backward included.

    PyTorch's counter does not know the CPU's attention kernel; it is taught here.
    """

    def forward(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object):
        return sdpa_backward_flop_count(grad, q, k, v)

    cpu_attention = {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: forward,
        _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        call()
    return counter.get_total_flops()
