"""Peak memory of one call, for the benchmarks."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

from diffsynth.vram_management import peak_memory, reset_peak_memory, synchronize


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
