"""Coarse guidance: the guided pass looks at latents averaged over small squares, a quarter of the tokens.

Noised latents are x = (1 - s) z + s n with white noise n. The mean over f x f latents keeps noise white and
divides its deviation by f:  pool(x) = (1 - s) pool(z) + (s / f) n'.  Divided by  a = (1 - s) + s / f  that is

    pool(x) / a = (1 - s') pool(z) + s' n',    s' = (s / f) / a = s / (f - (f - 1) s),

latents at noise level s', exactly, though z and n are not known apart. It is the shift of noise levels
between resolutions of Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2). s = 0 and s = 1 stay.
"""

import torch
from torch import Tensor

from diffsynth.configs.guidance import check_coarse


def noise_scale(sigma: float, factor: int) -> float:
    """Return s' / s, the factor on noise level sigma (0 to 1) where latents are averaged over squares."""
    return 1 / (factor - (factor - 1) * sigma)


def coarsen(latents: Tensor, sigma: float, factor: int, patch_size: tuple[int, int, int]) -> Tensor:
    """Average latents [B, C, F, h, w] at noise level sigma over squares, at level s'; differentiable.

    Rows and columns are repeated at the end up to whole patches: they have noise of the right level, which a
    mean over part of a square would not have. Factor 1 returns the latents themselves.

    Raises:
        ValueError: rows or columns are no multiples of factor.
    """
    if factor == 1:
        return latents
    rows, cols = latents.shape[-2:]
    check_coarse(factor, rows, cols)
    # avg_pool has no backward that repeats bit for bit on every device.
    pooled = latents.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))
    for axis, patch in ((-2, patch_size[1]), (-1, patch_size[2])):
        missing = -pooled.shape[axis] % patch
        if missing:
            last = pooled.narrow(axis, pooled.shape[axis] - 1, 1)
            pooled = torch.cat([pooled, last.repeat_interleave(missing, axis)], dim=axis)
    return pooled / (1 - sigma + sigma / factor)
