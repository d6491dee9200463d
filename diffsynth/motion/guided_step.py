"""One guided denoising step (paper section 3): optimise the latents to have the reference's motion."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from diffsynth.configs.fields import load
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.models.conditions import NO_CONDITION, ImageCondition
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.motion.coarse import coarsen, noise_scale
from diffsynth.motion.descriptors import MotionDescriptor, StepInputs
from diffsynth.motion.heads import precise
from diffsynth.motion.optimizer import Evaluation, OptimizationRecord, optimize_latents
from diffsynth.motion.reuse import GradientMemory

logger = logging.getLogger(__name__)

SCALES = (1.0, 2.0**-8, 2.0**-16, 2.0**-24)  # of a loss whose gradient may overflow in float16


def make_descriptor(guidance: MotionGuidance, dit: WanModel | None = None) -> MotionDescriptor:
    """Return the descriptor of a mode and variant; it works on several ranks if the DiT does."""
    make, spread = guidance.descriptor, getattr(dit, "spread", None)
    descriptor = (load(make) if isinstance(make, str) else make)(guidance)
    return descriptor if spread is None else spread.descriptor(descriptor)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients of all parameters of a model in this context, and restore them afterwards."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def guided_step(
    dit: WanModel,
    latents: Tensor,
    *,
    reference: Tensor,
    noise: Tensor,
    sigma: float,
    timestep: Tensor | float,
    context: Tensor,
    null_context: Tensor,
    guidance: MotionGuidance,
    start: tuple[Tensor, float] | None = None,
    stop: Callable[[], bool] | None = None,
    memory: GradientMemory | None = None,
    condition: ImageCondition = NO_CONDITION,
    reference_condition: ImageCondition = NO_CONDITION,
) -> tuple[Tensor, OptimizationRecord]:
    """Move the latents of one denoising step towards the reference's motion; the model does not change.

    Args:
        dit: the DiT that denoises.
        latents: [1, C, F, h, w], before the step.
        reference: clean latents of the reference, in the shape of latents.
        noise: the run's initial noise, in the same shape.
        sigma: noise level of the step, in 0..1.
        timestep: the same noise level on the 0..1000 scale.
        context: embedding of the positive prompt, [1, L, text_dim].
        null_context: embedding of the empty prompt, with which the DiT runs on the reference.
        guidance: parameters of the guidance.
        start: the run's first latents and their sigma, for descriptors that use the mean velocity since then.
        stop: called before each optimiser step; the optimiser stops once it returns True.
        memory: gradients of earlier guided steps; a step that repeats them records no losses.
        condition: the run's image condition; frames that its images fix do not change.
        reference_condition: the same condition, with the reference's frames in place of the images.

    Returns:
        The moved latents, in the dtype of `latents`, and a record of the optimisation.

    Raises:
        ValueError: the latents, the reference and the noise differ in shape, or B is not 1.
        NonFiniteGuidanceError: a loss or gradient is not finite.
    """
    _check_shapes(latents, reference=reference, noise=noise)
    descriptor, free = make_descriptor(guidance, dit), condition.free(precise(latents))
    scale = noise_scale(sigma, guidance.coarse)  # averaging latents averages their noise as well
    level = scale * torch.as_tensor(timestep, dtype=torch.float32).reshape(1)
    mean = _mean_velocity(latents, sigma, start)
    inputs = StepInputs(
        dit=dit, timestep=level, sigma=scale * sigma, null_context=null_context, mean_velocity=mean
    )

    def observe(x: Tensor, prompt: Tensor, pictures: ImageCondition) -> Any:
        pictures = pictures.averaged(lambda c: coarsen(c, 0, guidance.coarse, dit.patch_size))
        seen = pictures.hold(coarsen(x, sigma, guidance.coarse, dit.patch_size))
        return descriptor.observe(seen, prompt, replace(inputs, condition=pictures))

    @cache
    @torch.no_grad()
    def target() -> Any:
        noised = (1 - sigma) * precise(reference) + sigma * precise(noise)
        return descriptor.describe(observe(noised, null_context, reference_condition))

    scales = [*SCALES] if dit.dtype == torch.float16 else [1.0]

    def objective(x: Tensor) -> Evaluation:
        while True:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                # The target is passed too, since tile flow must read the windows found in the target.
                seen = descriptor.describe(observe(leaf, context, condition), target())
                loss, terms = descriptor.loss(seen, target())
                (gradient,) = torch.autograd.grad(scales[0] * loss, leaf)
            if len(scales) == 1 or gradient.isfinite().all():
                return Evaluation(loss.detach(), gradient / scales[0] * free, terms)
            scales.pop(0)  # the gradient overflows inside the DiT

    with frozen(dit):
        moved, record = optimize_latents(latents, objective, guidance, stop, memory)
    logger.debug("guided step at sigma %.4f: losses %s, parts %s", sigma, record.losses, record.parts)
    return torch.where(free == 1, moved, latents), record


def _check_shapes(latents: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if latents.shape[0] != 1 or other.shape != latents.shape:
            raise ValueError(
                f"latents and {name} must both be [1, C, F, h, w] of one shape; got "
                f"{tuple(latents.shape)} and {tuple(other.shape)}"
            )


def _mean_velocity(latents: Tensor, sigma: float, start: tuple[Tensor, float] | None) -> Tensor | None:
    """Return the mean velocity since the run's start; None without a start or at the start itself."""
    if start is None or start[1] == sigma:
        return None
    return (precise(latents) - precise(start[0])) / (sigma - start[1])
