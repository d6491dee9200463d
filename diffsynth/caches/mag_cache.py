"""MagCache: steps are skipped while the size of the blocks' residual, known beforehand, has changed little.

From step to step the residual shrinks by a ratio that hardly depends on prompt or seed. Multiplied up since
the blocks last ran, the ratios tell how much larger the kept residual is than the true one; what that is off
by adds up over skipped steps until it reaches the threshold. Decisions need no look at any tensor.
MagCache: Ma et al. 2025, arXiv 2506.09045.
"""

from diffsynth.caches.rules import Probe, StepCache
from diffsynth.configs.caches import CacheOptions


class MagCache(StepCache):
    """Decides, step by step, from the ratios of one prompt's residuals.

    Args:
        ratios: mean |residual| of each step of the run over that of the step before, the first one 1.
        threshold: sum of errors at which blocks run again, >= 0; 0 never skips.
        max_skip: steps skipped in a row at most, >= 1 (K in the paper).
        retention: share of the run's steps, from the first, that always compute, in [0, 1].
        first_step: step of the run at which this object's first call comes; it always computes.

    Attributes:
        accumulated: sum of errors since the blocks last ran.
    """

    kept = ("_step", "accumulated", "_ratio", "_skipped")

    def __init__(
        self,
        ratios: tuple[float, ...],
        threshold: float,
        *,
        max_skip: int,
        retention: float,
        first_step: int = 0,
    ) -> None:
        super().__init__()
        self.threshold, self.max_skip = threshold, max_skip
        self.ratios = ratios
        self.accumulated = 0.0
        self._ratio = 1.0
        self._skipped = 0
        self._step = first_step
        # The residual that is to be reused comes from the first call, and is as large as itself.
        self._first_choice = max(first_step + 1, int(len(ratios) * retention))

    @classmethod
    def from_options(cls, options: CacheOptions, prompt: str, steps: range, num_steps: int) -> "MagCache":
        """Return the rule of a run's options; see `make_rule`."""
        assert options.ratios is not None  # resolving the options has put the checkpoint's there
        return cls(
            options.ratios.of(prompt, num_steps),
            options.threshold,
            max_skip=options.max_skip,
            retention=options.retention,
            first_step=steps.start,
        )

    def decide(self, _probe: Probe) -> bool:
        """Return True if the blocks must run at this step, False if `residual` may stand for them.

        Raises:
            RuntimeError: called for more steps than there are ratios.
        """
        if self._step == len(self.ratios):
            raise RuntimeError(f"this MagCache is for {len(self.ratios)} steps: make a new one for each run")
        forced = self._step < self._first_choice
        if not forced:
            self._ratio *= self.ratios[self._step]
            self.accumulated += abs(1 - self._ratio)
            self._skipped += 1
        self._step += 1
        skip = not forced and self.accumulated < self.threshold and self._skipped <= self.max_skip
        if not skip:
            self.accumulated, self._ratio, self._skipped = 0.0, 1.0, 0
        return not skip
