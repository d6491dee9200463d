"""TeaCache: when a denoising step may reuse the last one's work instead of running the blocks.

The time projection e0 of a step tells how far the blocks' output will move: a polynomial, fitted per model,
turns the relative change of e0 into an estimate, estimates add up, and blocks run again once the sum reaches
the threshold. A skipped step adds the last residual (output of the blocks minus their input).
TeaCache: Liu et al. 2024, arXiv 2411.19108.
"""

import numpy as np
from torch import Tensor

from diffsynth.caches.rules import Probe, StepCache
from diffsynth.configs.cache_tables import tea_cache_models
from diffsynth.configs.caches import CacheOptions


class TeaCache(StepCache):
    """Decides, step by step, whether the blocks run; keeps the residual for the steps where they do not.

    One object serves one prompt of a run. e0 depends on the timestep alone, so that the objects of both
    prompts decide alike. Each decision waits for the device.

    Args:
        num_steps: steps in which the prompt runs; the first and the last one always compute.
        threshold: sum of estimated changes at which blocks run again; higher skips more, 0 never.
        model_id: a key of `tea_cache_models()`.

    Attributes:
        accumulated: sum of estimated changes since the blocks last ran.
        relative_change: mean |e0 - previous e0| / mean |previous e0| of the last call, None at the first.
    """

    kept = ("_step", "accumulated", "relative_change", "_previous")

    def __init__(self, num_steps: int, threshold: float, model_id: str) -> None:
        super().__init__()
        self.num_steps, self.threshold = num_steps, threshold
        self.accumulated = 0.0
        self.relative_change: float | None = None
        self._coefficients = tea_cache_models()[model_id].coefficients
        self._step = 0
        self._previous: Tensor | None = None

    @classmethod
    def from_options(cls, options: CacheOptions, _prompt: str, steps: range, _num_steps: int) -> "TeaCache":
        """Return the rule of a run's options; see `make_rule`."""
        return cls(len(steps), options.threshold, options.model_id)

    def decide(self, probe: Probe) -> bool:
        """Return True if the blocks must run at this step, False if `residual` may stand for them.

        Raises:
            RuntimeError: called more than num_steps times.
        """
        if self._step == self.num_steps:
            raise RuntimeError(f"this TeaCache is for {self.num_steps} steps: make a new one for each run")
        e0 = probe.modulation.detach().float()
        # Estimates of small changes are below 0, and so is their sum: 0 is no bound that it reaches.
        forced = self._step in (0, self.num_steps - 1) or self.threshold == 0
        if self._previous is not None:
            change = (e0 - self._previous).abs().mean() / self._previous.abs().mean()
            self.relative_change = change.item()
            self.accumulated += float(np.polyval(self._coefficients, self.relative_change))
        self._previous = e0
        self._step += 1
        # Written as "not below" so that a sum that is not a number computes.
        compute = forced or not self.accumulated < self.threshold
        if compute:
            self.accumulated = 0.0
        return compute
