"""Gradient reuse (paper section 3.4): when to compute a fresh gradient, and what to use in between.

The published rule computes a fresh gradient every `interval` inner (optimiser) steps and repeats it between.
The other rules are ours, for comparison at equal numbers of fresh gradients. `GradientReuse` holds within a
guided step; `GradientMemory` carries gradients from one guided step to those after it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance


class GradientReuse:
    """Gradients of a series of steps: if `due`, pass a new one to `fresh`; then step along `current`.

    Args:
        interval: steps from one fresh gradient to the next.
        above: reuse only while the last two fresh gradients have at least this cosine; None: always.
        rule: "repeat", "falling" or "extrapolate".
    """

    def __init__(self, interval: int, above: float | None = None, rule: str = "repeat") -> None:
        self._interval, self._above, self._rule = interval, above, rule
        self._last: Tensor | None = None
        self._before: Tensor | None = None
        self._evaluated_at: list[int] = []

    def due(self, step: int) -> bool:
        """Return whether a step (0-based) needs a fresh gradient: every `interval`-th step does, and every
        step while the cosine of the last two fresh gradients is below `above`."""
        if self._last is None:
            return True
        age = step - self._evaluated_at[-1]
        if age == 0 or age >= self._interval or self._above is None:
            return age >= self._interval
        if self._before is None:
            return True
        cosine = torch.cosine_similarity(self._last.flatten(), self._before.flatten(), dim=0)
        return cosine.item() < self._above

    def fresh(self, step: int, gradient: Tensor) -> None:
        """Take in the gradient computed at a step."""
        self._before, self._last = self._last, gradient
        self._evaluated_at.append(step)

    def current(self, step: int) -> Tensor:
        """Return the gradient to use: the last one or, with the rule "extrapolate", the one on the line
        through the last two, as in a secant method."""
        assert self._last is not None  # the first step is due
        age = step - self._evaluated_at[-1]
        if age == 0 or self._before is None or self._rule != "extrapolate":
            return self._last
        between = self._evaluated_at[-1] - self._evaluated_at[-2]
        return self._last + (age / between) * (self._last - self._before)

    def rate(self, step: int) -> float:
        """Return the factor on the learning rate: 1, or lower for older gradients with the rule "falling"."""
        age = step - self._evaluated_at[-1]
        return 1 - age / self._interval if self._rule == "falling" else 1.0

    def state(self) -> dict[str, Any]:
        """Return the series so far, as tensors and plain numbers by name."""
        return {"last": self._last, "before": self._before, "evaluated_at": list(self._evaluated_at)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue the series from a `state`."""
        self._last, self._before = state["last"], state["before"]
        self._evaluated_at = list(state["evaluated_at"])


class GradientMemory:
    """Gradients that later guided steps may repeat: those of the last guided step that computed its own,
    by inner step.
    Every `recompute_every`-th guided step computes its own. Those between repeat the stored gradients, each
    at its own inner step, without running the DiT. With `recompute_below`, a guided step also computes its
    own while the cosine between the first gradients of the last two computing steps is below that value;
    the second guided step therefore always does.
    """

    def __init__(self, guidance: MotionGuidance) -> None:
        self._steps = GradientReuse(guidance.recompute_every, guidance.recompute_below)
        self._step = -1
        self._gradients: dict[int, Tensor] = {}

    def begin(self) -> Mapping[int, Tensor] | None:
        """Begin a guided step; return the gradients to repeat, by inner step, or None to compute its own."""
        self._step += 1
        if self._steps.due(self._step):
            self._gradients = {}
            return None
        return self._gradients

    def keep(self, inner_step: int, gradient: Tensor) -> None:
        """Take in a gradient that the guided step computed."""
        if not self._gradients:
            self._steps.fresh(self._step, gradient)
        self._gradients[inner_step] = gradient

    def state(self) -> dict[str, Any]:
        """Return the gradients of the guided steps so far, as tensors and plain numbers by name."""
        kept = {f"steps.{name}": value for name, value in self._steps.state().items()}
        kept |= {f"gradient.{inner_step}": gradient for inner_step, gradient in self._gradients.items()}
        return {**kept, "step": self._step, "inner_steps": list(self._gradients)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`: the guided steps that follow repeat the same gradients."""
        self._step = state["step"]
        self._gradients = {k: state[f"gradient.{k}"] for k in state["inner_steps"]}
        self._steps.restore({name: state[f"steps.{name}"] for name in self._steps.state()})
