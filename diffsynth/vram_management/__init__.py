"""Where weights live while a pipeline runs."""

from diffsynth.vram_management.memory import (
    choose_device,
    device_memory,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from diffsynth.vram_management.residency import Residency

__all__ = ["Residency", "choose_device", "device_memory", "peak_memory", "reset_peak_memory", "synchronize"]
