"""The sampler of few-step models that DMD or Self-Forcing distilled: each step begins with fresh noise.

Such a model predicts clean latents x - sigma * v that are final at any level; the next level is these latents
noised anew, (1 - sigma') * clean + sigma' * noise, instead of a step along the velocity.
"""

import hashlib

import torch
from torch import Tensor

from diffsynth.schedulers.flow_match import FlowMatchScheduler, mix_noise, nearest_step, require_same_shape


class RenoiseScheduler(FlowMatchScheduler):
    """The levels of FlowMatchScheduler, with fresh noise after each step but the last.

    The noise is drawn on the CPU from `seed` and the step alone, so that a run that continues draws the same.
    """

    def __init__(self, shift: float = 5.0, seed: int = 0) -> None:
        super().__init__(shift)
        self.seed = seed

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """Return the predicted clean latents noised to the next level; otherwise as FlowMatchScheduler."""
        index = nearest_step(self.timesteps, timestep)
        require_same_shape("model_output", model_output, "sample", sample)
        velocity = model_output.to(sample.device, torch.float32)
        clean = sample.float() - float(self.sigmas[index]) * velocity
        if index + 1 < len(self.sigmas):
            digest = hashlib.sha256(f"renoise {self.seed} {index}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
            noise = torch.randn(sample.shape, generator=generator)
            clean = mix_noise(clean, noise, float(self.sigmas[index + 1]))
        return clean.to(sample.dtype)
