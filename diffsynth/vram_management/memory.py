"""Query the memory of the devices."""

import sys
from pathlib import Path

import torch


def device_memory(device: torch.device) -> int:
    """Total bytes of an accelerator's own memory; 0 where it has none to speak of."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def choose_device(device: str | torch.device) -> torch.device:
    """Return a torch device; "auto" is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: torch does not know the name, or the accelerator is missing.
    """
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be 'auto' or a torch device such as 'cpu' or 'cuda:0'; got {device!r}"
        ) from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        build = "this PyTorch is a CPU build" if torch.version.cuda is None else "torch sees no such device"
        raise ValueError(f"device {str(device)!r} needs CUDA, and {build}; use 'cpu' or 'auto'")
    return chosen


def reset_peak_memory(device: torch.device) -> None:
    """Start a new measurement of `peak_memory` where the device can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Most bytes on an accelerator since the reset; on a CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def available_memory(device: torch.device) -> int:
    """Return the bytes that could be allocated now, on an accelerator or by this process on a CPU.

    0 means that the system does not say.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        words = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(words["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 0
