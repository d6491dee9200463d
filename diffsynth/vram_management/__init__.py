"""Where weights live while a pipeline runs, and what memory there is."""

from diffsynth.planning.activations import activation_bytes, should_checkpoint
from diffsynth.vram_management.memory import (
    available_memory,
    choose_device,
    device_memory,
    peak_memory,
    reset_peak_memory,
    synchronize,
)
from diffsynth.vram_management.residency import Residency

__all__ = [
    "Residency",
    "activation_bytes",
    "available_memory",
    "choose_device",
    "device_memory",
    "peak_memory",
    "reset_peak_memory",
    "should_checkpoint",
    "synchronize",
]
