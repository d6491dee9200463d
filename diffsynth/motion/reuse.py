"""Gradient reuse (paper section 3.4): when to compute a fresh gradient, and what to step on in between.

The published rule is a fresh gradient every `interval` inner steps and the same one again in between. The
other rules here are ours, to be compared at equal numbers of fresh gradients.
"""

import torch
from torch import Tensor

from diffsynth.motion.guidance import MotionGuidance


class GradientReuse:
    """The gradients of one inner loop: ask `due` before each step, hand in fresh ones, step on `current`."""

    def __init__(self, guidance: MotionGuidance) -> None:
        self._guidance = guidance
        self._last: Tensor | None = None
        self._before: Tensor | None = None
        self._evaluated_at: list[int] = []

    def due(self, step: int) -> bool:
        """Whether an inner step (from 0) needs a fresh gradient: after `interval` steps, or at once while the
        last two fresh ones point apart (cosine below `reuse_above`)."""
        if self._last is None:
            return True
        age = step - self._evaluated_at[-1]
        return age >= self._guidance.interval or (age > 0 and self._turning())

    def fresh(self, step: int, gradient: Tensor) -> None:
        """Take in the gradient computed at an inner step."""
        self._before, self._last = self._last, gradient
        self._evaluated_at.append(step)

    def current(self, step: int) -> Tensor:
        """The gradient to step on: the last one, or by the rule "extrapolate" the one that lies on the line
        through the last two, as in a secant method."""
        age = step - self._evaluated_at[-1]
        if age == 0 or self._before is None or self._guidance.reuse != "extrapolate":
            return self._last
        between = self._evaluated_at[-1] - self._evaluated_at[-2]
        return self._last + (age / between) * (self._last - self._before)

    def rate(self, step: int) -> float:
        """Factor on the learning rate: 1, or by the rule "falling" less the older the gradient is."""
        age = step - self._evaluated_at[-1]
        return 1 - age / self._guidance.interval if self._guidance.reuse == "falling" else 1.0

    def _turning(self) -> bool:
        threshold = self._guidance.reuse_above
        if threshold is None:
            return False
        if self._before is None:
            return True
        cosine = torch.cosine_similarity(self._last.flatten(), self._before.flatten(), dim=0)
        return cosine.item() < threshold
