"""The inner loop of a guided step (paper section 3.4): AdamW on the latents, with gradient reuse.

Every `interval`-th inner step computes a fresh gradient; in between AdamW steps on the last one again. The
learning rate falls as lr_k = lr0 - (lr0 - lr1) * k / inner_steps. The optimiser is new at each guided step.
A guided step that repeats the gradients of an earlier one (`GradientMemory`) computes none.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.motion.heads import precise
from diffsynth.motion.reuse import GradientMemory, GradientReuse


class Evaluation(NamedTuple):
    """Result of an objective: the loss (scalar), its gradient on the latents, and its parts by name."""

    loss: Tensor
    gradient: Tensor
    parts: dict[str, Tensor]


Objective = Callable[[Tensor], Evaluation]
Move = Callable[[Tensor, float], None]  # moves the latents in place by a gradient at a learning rate


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizationRecord:
    """Record of an inner loop.

    Attributes:
        losses, parts, evaluated_at: loss, its parts and the inner step of each fresh gradient.
        lrs: learning rate of each inner step taken.
    """

    losses: tuple[float, ...]
    parts: tuple[dict[str, float], ...]
    evaluated_at: tuple[int, ...]
    lrs: tuple[float, ...]

    @property
    def gradient_evaluations(self) -> int:
        return len(self.losses)


class NonFiniteGuidanceError(RuntimeError):
    """A loss or gradient is not finite; `latents` are the last ones at which both were, or the first."""

    def __init__(self, message: str, latents: Tensor) -> None:
        super().__init__(message)
        self.latents = latents


def _adamw(moved: Tensor, guidance: MotionGuidance) -> Move:
    """Use AdamW as published, new at each guided step; its first steps move every element by about lr."""
    optimizer = torch.optim.AdamW([moved], lr=guidance.lr[0], weight_decay=guidance.weight_decay)

    def move(gradient: Tensor, lr: float) -> None:
        moved.grad = gradient
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()

    return move


def _gradient(moved: Tensor, guidance: MotionGuidance) -> Move:
    """Down the gradient, scaled so that a first, fresh one moves the elements by lr in the root mean square:
    most where the motion is, and hardly where it is not."""
    scale: list[Tensor] = []

    def move(gradient: Tensor, lr: float) -> None:
        if not scale:
            scale.append(gradient.square().mean().sqrt().clamp_min(1e-30))
        moved.mul_(1 - lr * guidance.weight_decay).sub_(gradient / scale[0], alpha=lr)

    return move


UPDATES: dict[str, Callable[[Tensor, MotionGuidance], Move]] = {"adamw": _adamw, "gradient": _gradient}


@torch.no_grad()
def optimize_latents(
    latents: Tensor,
    objective: Objective,
    guidance: MotionGuidance,
    stop: Callable[[], bool] | None = None,
    memory: GradientMemory | None = None,
) -> tuple[Tensor, OptimizationRecord]:
    """Move latents of any shape down an objective; return new ones of their dtype, and a record.

    A float32 copy is moved: in bfloat16 most steps would round to nothing.

    Args:
        latents, objective: where to start, and what to descend.
        guidance: the numbers of the loop.
        stop: asked before each inner step; True ends the loop.
        memory: gradients of the guided steps before; the objective is not called for those that it repeats.

    Raises:
        NonFiniteGuidanceError: a loss or gradient is not finite. The latents that were passed never change.
    """
    moved = precise(latents.detach()).clone()
    move = UPDATES[guidance.update](moved, guidance)
    reuse = GradientReuse(guidance.interval, guidance.reuse_above, guidance.reuse)
    remembered = None if memory is None else memory.begin()
    good = latents
    evaluations: list[tuple[float, dict[str, float]]] = []
    evaluated_at, lrs = [], []
    first, end = guidance.lr
    for step in range(guidance.inner_steps):
        if stop is not None and stop():
            break
        if remembered is not None:
            if step in remembered:
                reuse.fresh(step, remembered[step])
        elif reuse.due(step):
            evaluation = objective(moved)
            evaluations.append(_read(evaluation, step, good))
            good = moved.to(latents.dtype, copy=True)
            reuse.fresh(step, evaluation.gradient)
            if memory is not None:
                memory.keep(step, evaluation.gradient)
            evaluated_at.append(step)
        rate = first - (first - end) * step / guidance.inner_steps
        lrs.append(rate * reuse.rate(step))
        move(reuse.current(step), lrs[-1])
    return moved.to(latents.dtype), OptimizationRecord(
        losses=tuple(loss for loss, _ in evaluations),
        parts=tuple(parts for _, parts in evaluations),
        evaluated_at=tuple(evaluated_at),
        lrs=tuple(lrs),
    )


def _read(evaluation: Evaluation, step: int, good: Tensor) -> tuple[float, dict[str, float]]:
    """Return the loss and its parts; the one time that a gradient makes the CPU wait for the device."""
    scalars = [evaluation.loss, evaluation.gradient.isfinite().all(), *evaluation.parts.values()]
    loss, whole, *values = torch.stack([scalar.to(evaluation.loss) for scalar in scalars]).tolist()
    parts = dict(zip(evaluation.parts, values, strict=True))
    if not (math.isfinite(loss) and whole):
        wrong, told = "gradient" if math.isfinite(loss) else "loss", [f"{n}={v:g}" for n, v in parts.items()]
        raise NonFiniteGuidanceError(
            f"the {wrong} of motion guidance is not finite at inner step {step} (loss {loss:g}; "
            f"{', '.join(told)})",
            good,
        )
    return loss, parts
