"""Noise schedules and solvers for flow matching."""

from diffsynth.configs.fields import Choice, check_value, load
from diffsynth.configs.options import SAMPLERS
from diffsynth.schedulers.flow_match import FlowMatchScheduler
from diffsynth.schedulers.unipc import UniPCScheduler

__all__ = ["FlowMatchScheduler", "UniPCScheduler", "make_scheduler"]


def make_scheduler(name: str, shift: float = 5.0) -> FlowMatchScheduler | UniPCScheduler:
    """Return a new scheduler with its own shift.

    Args:
        name: a key of `configs.options.SAMPLERS`.
        shift: of the noise schedule.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    return load(SAMPLERS[check_value("sampler", Choice(SAMPLERS), name)])(shift=shift)
