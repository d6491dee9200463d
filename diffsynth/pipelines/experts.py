"""Which of two experts denoises a step: the high-noise one down to a boundary, then the low-noise one."""

from torch import Tensor

from diffsynth.pipelines.components import Components


def is_high_noise(timestep: Tensor | float, boundary: float) -> bool:
    """Return whether the high-noise expert denoises at a timestep (0 to 1000), given the boundary in 0..1.

    A timestep equal to 1000 * boundary counts as high noise.
    """
    return float(timestep) >= boundary * 1000


def expert_steps(timesteps: Tensor, step: int, boundary: float) -> range:
    """Return the steps (0-based) around `step` that one expert denoises; `timesteps` must be descending."""
    high = [is_high_noise(timestep, boundary) for timestep in timesteps]
    first = high.index(high[step])
    return range(first, first + high.count(high[step]))


def expert_at(models: Components, timesteps: Tensor, step: int, boundary: float) -> tuple[str, range]:
    """Return the name in `Components` of the DiT that denoises a step, and all steps that it denoises.

    A `step` past the end is treated as the last one.
    """
    step = min(step, len(timesteps) - 1)
    if models.low_noise_dit is None:
        return "dit", range(len(timesteps))
    steps = expert_steps(timesteps, step, boundary)
    return "dit" if is_high_noise(timesteps[step], boundary) else "low_noise_dit", steps
