"""Latent prediction (FlowMotion, CVPR 2026): compare predicted clean latents, no backward through the DiT.

    z0 = z - sigma * v,    loss = 20 * mse(z0_ref, z0) + 5 * mse(D(z0_ref), D(z0))

v is constant, so the gradient is that of the two mean squares alone. D: absolute differences of consecutive
frames, then of all pairs of frames. From the second guided step on, v keeps its part along the mean velocity
so far and a tenth of the rest.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.motion.descriptors import Loss, StepInputs


@dataclass(frozen=True, slots=True)
class LatentPrediction:
    """The predicted clean latents [1, C, F, h, w] themselves are the descriptor."""

    guidance: MotionGuidance

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Tensor:
        with torch.no_grad():
            velocity = self._velocity(latents, context, inputs)
            if inputs.mean_velocity is not None:
                velocity = damp_across(velocity, inputs.mean_velocity, self.guidance.across_velocity)
        return latents - inputs.sigma * velocity

    def _velocity(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Tensor:
        """Return the prediction, guided against the empty prompt, or of that prompt itself."""
        arguments = inputs.of_dit(latents)
        velocity = inputs.dit(latents, context=context, **arguments).to(latents.dtype)
        if context is inputs.null_context or self.guidance.prediction_cfg == 1:
            return velocity
        null = inputs.dit(latents, context=inputs.null_context, **arguments).to(latents.dtype)
        return null + self.guidance.prediction_cfg * (velocity - null)

    def describe(self, features: Tensor, _reference: Tensor | None = None) -> Tensor:
        return features

    def loss(self, descriptor: Tensor, reference: Tensor) -> Loss:
        prediction = F.mse_loss(descriptor, reference)
        difference = F.mse_loss(frame_differences(descriptor), frame_differences(reference))
        total = self.guidance.prediction_weight * prediction + self.guidance.difference_weight * difference
        return Loss(total, {"prediction": prediction.detach(), "difference": difference.detach()})


def damp_across(velocity: Tensor, mean_velocity: Tensor, rest: float) -> Tensor:
    """Keep the part of [B, C, F, h, w] along mean_velocity, over channels, and `rest` of what is left."""
    length = mean_velocity.square().sum(1, keepdim=True).clamp(min=torch.finfo(velocity.dtype).tiny)
    along = (velocity * mean_velocity).sum(1, keepdim=True) / length * mean_velocity
    return along + rest * (velocity - along)


def frame_differences(latents: Tensor) -> Tensor:
    """Absolute differences of consecutive frames and of all pairs: [B, C, F, h, w] -> [B, C, D, h, w]."""
    count = latents.shape[2]
    first, second = torch.triu_indices(count, count, offset=1, device=latents.device)
    consecutive = latents[:, :, 1:] - latents[:, :, :-1]
    return torch.cat([consecutive, latents[:, :, second] - latents[:, :, first]], dim=2).abs()
