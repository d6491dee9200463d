"""First-block cache: the first block runs at every step, and tells whether the others must.

If the first block's residual differs by less than `threshold` (mean absolute difference, relative) from that
of the last full computation, the last residual of the other blocks is reused.
First Block Cache of ParaAttention, and as in diffusers' FirstBlockCacheConfig.
"""

from torch import Tensor

from diffsynth.caches.rules import Probe, StepCache
from diffsynth.configs.caches import CacheOptions


class FirstBlockCache(StepCache):
    """Decides by the change of the first block's residual; the first call always computes.

    Keeps two residuals: of the first block and of the others. Each decision synchronises with the device.

    Args:
        threshold: relative change at which all blocks run, >= 0; 0 never skips.

    Attributes:
        relative_change: relative change of the last call; None until the second call.
    """

    probe_blocks = 1
    kept = ("relative_change", "_reference")

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.relative_change: float | None = None
        self._reference: Tensor | None = None

    @classmethod
    def from_options(cls, options: CacheOptions, *_steps: object) -> "FirstBlockCache":
        """Return the rule of a run's options; see `make_rule`."""
        return cls(options.threshold)

    def decide(self, probe: Probe) -> bool:
        """Return True if the other blocks must run, given what the first one added [1, S, D]."""
        residual = probe.residual
        assert residual is not None  # one block runs before the decision
        if self._reference is not None:
            change = (residual - self._reference).abs().mean() / self._reference.abs().mean()
            self.relative_change = change.item()
        # `not <` instead of `>=`, so that NaN also computes.
        compute = self.relative_change is None or not self.relative_change < self.threshold
        if compute:
            self._reference = residual
        return compute
