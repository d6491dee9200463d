"""Noise schedules and solvers for flow matching."""

from diffsynth.configs.fields import Choice, check_value, load
from diffsynth.configs.options import SAMPLERS, RunOptions
from diffsynth.schedulers.flow_match import FlowMatchScheduler, RenoiseScheduler
from diffsynth.schedulers.unipc import UniPCScheduler

__all__ = ["FlowMatchScheduler", "RenoiseScheduler", "UniPCScheduler", "make_scheduler", "run_scheduler"]


def make_scheduler(name: str, shift: float = 5.0, seed: int = 0) -> FlowMatchScheduler:
    """Return a new scheduler with its own shift.

    Args:
        name: a key of `configs.options.SAMPLERS`.
        shift: shift of the noise schedule.
        seed: seed of the noise that a sampler draws in each step.

    Raises:
        ValueError: an unknown name; the known ones are listed.
    """
    scheduler = load(SAMPLERS[check_value("sampler", Choice(SAMPLERS), name)])
    return scheduler(shift, seed) if scheduler is RenoiseScheduler else scheduler(shift)


def run_scheduler(options: RunOptions) -> FlowMatchScheduler:
    """Return a new scheduler with the timesteps of a run."""
    scheduler = make_scheduler(options.sampler, options.sigma_shift, options.seed)
    if options.sigmas is None:
        scheduler.set_timesteps(options.num_inference_steps, options.denoising_strength)
    else:
        scheduler.set_sigmas(options.sigmas)
    return scheduler
