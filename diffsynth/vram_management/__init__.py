"""Where weights live while a pipeline runs, and what memory there is."""

from diffsynth.vram_management.memory import (
    available_memory,
    choose_device,
    choose_dtype,
    device_memory,
    memory_peaks,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from diffsynth.vram_management.residency import Residency

__all__ = [
    "Residency", "available_memory", "choose_device", "choose_dtype", "device_memory", "memory_peaks",
    "peak_memory", "reset_peak_memory", "synchronize",
]  # fmt: skip
