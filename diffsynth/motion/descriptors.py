"""The interface of motion descriptors: observe the DiT, describe motion, compare two descriptions.

A new method is one file with such a class, and an entry of `configs.descriptors.DESCRIPTORS`;
gradient reuse, learning rates and the range of guided steps are the optimiser's.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from diffsynth.models.conditions import NO_CONDITION, ImageCondition
from diffsynth.models.wan_video_dit import WanModel


class Loss(NamedTuple):
    """total, a scalar to differentiate; parts, detached scalars by name, for the record."""

    total: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInputs:
    """Inputs that a denoising step offers to a descriptor.

    Attributes:
        dit: the DiT that denoises.
        timestep: [1], float32, on the scale of 0 to 1000.
        sigma: its noise level, in 0..1.
        null_context: the empty prompt, [1, L, D].
        mean_velocity: mean of the velocities of the steps so far, shaped as the latents; None at the first.
        condition: condition from the pictures that the latents begin or end with.
    """

    dit: WanModel
    timestep: Tensor
    sigma: float
    null_context: Tensor
    mean_velocity: Tensor | None = None
    condition: ImageCondition = NO_CONDITION

    def of_dit(self, latents: Tensor) -> dict[str, Any]:
        """Return the DiT's arguments for latents [B, C, F, h, w], but for these and the prompt."""
        return self.condition.of_dit(self.timestep, latents.shape[0], latents.shape[2])


class MotionDescriptor(Protocol):
    """One way to read motion off latents. The reference is described under no_grad, without `reference`."""

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Any:
        """Return what the DiT makes of latents [1, C, F, h, w] under a prompt; differentiable in them."""

    def describe(self, features: Any, reference: Any = None) -> Any:
        """Return the motion in what `observe` returned, comparable with that of `reference`."""

    def loss(self, descriptor: Any, reference: Any) -> Loss:
        """Return how far a descriptor is from the reference's."""
