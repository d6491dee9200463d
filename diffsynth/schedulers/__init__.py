"""Noise schedules and solvers for flow matching."""

from diffsynth.schedulers.flow_match import FlowMatchScheduler
from diffsynth.schedulers.unipc import UniPCScheduler

SAMPLERS: dict[str, type[FlowMatchScheduler] | type[UniPCScheduler]] = {
    "euler": FlowMatchScheduler,
    "unipc": UniPCScheduler,
}

__all__ = ["SAMPLERS", "FlowMatchScheduler", "UniPCScheduler", "make_scheduler"]


def make_scheduler(name: str, shift: float = 5.0) -> FlowMatchScheduler | UniPCScheduler:
    """Return a new scheduler by its name in SAMPLERS, with its own shift.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    if name not in SAMPLERS:
        raise ValueError(f"Unknown sampler {name!r}; known: {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name](shift=shift)
