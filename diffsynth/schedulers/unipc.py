"""UniPC, order 2: the multistep predictor-corrector solver that Wan2.1 samples with by default.

UniPC: Zhao et al. 2023, arXiv 2302.04867: the predictor UniP-2 and the corrector UniC-2 with
B(h) = exp(-h) - 1 ("bh2") on predictions of the clean sample. With alpha = 1 - sigma and
lambda = log(alpha / sigma), all steps start from the exact solution for a constant prediction,

    base = sigma / sigma_last * x_last - alpha * phi * x0_last,  phi = exp(-h) - 1,  h = lambda - lambda_last

and subtract alpha * phi * (weighted differences of predictions). Each step makes one network call, since
the corrector reuses the call of the next step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffsynth.schedulers.flow_match import FlowMatchScheduler, nearest_step, require_same_shape

_U_MAX = 0.999
"""The highest sigma before the shift, as in Wan2.1; a sigma of 1 would make lambda infinite."""


class _Prediction(NamedTuple):
    """One network call: the noise level and the clean sample that it points to (float32)."""

    sigma: float
    x0: Tensor


class UniPCScheduler(FlowMatchScheduler):
    """Flow-matching schedule with UniPC steps, which must be taken in order, one run at a time.

    Before the shift the levels fall evenly from 0.999 * denoising_strength, so that the first level is
    0.999 of the base's.

    Args:
        shift: how far sigmas are pushed towards noise, > 0; the default of `set_timesteps`.
        num_train_timesteps: the timestep that stands for sigma = 1.

    `sigmas` is float32 [N] on the CPU, falling, without the final 0. `timesteps` is float32 [N]: 1000 * sigma
    truncated to whole numbers, as Wan2.1 passes them to its network.
    """

    def __init__(self, shift: float = 5.0, num_train_timesteps: int = 1000) -> None:
        super().__init__(shift, sigma_max=_U_MAX, num_train_timesteps=num_train_timesteps)
        self._next = 0
        # Saved between steps: "sample" (corrected start of the last step, float32), "returned" (what `step`
        # returned), and "sigma", "x0" of the last two predictions under "last." and "before.".
        self._past: dict[str, Any] = {}

    def set_sigmas(self, sigmas: Sequence[float]) -> None:
        """Set sigmas, which fall from below 1 to above 0, for a new run and drop the old state."""
        levels = torch.tensor(sigmas, dtype=torch.float64)
        self.sigmas, self._exact_sigmas = levels.float(), [*sigmas, 0.0]
        self.timesteps = (levels * self.num_train_timesteps).trunc().float()
        self._next, self._past = 0, {}

    def state(self) -> dict[str, object]:
        """Return the state that the next step needs, as tensors and plain numbers by name."""
        return {"next": self._next, **self._past}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, after set_timesteps: the steps that follow are bit-identical.

        Raises:
            ValueError: the state does not fit these timesteps.
        """
        step = state.get("next")
        if not isinstance(step, int) or not 0 <= step <= len(self.timesteps):
            raise ValueError(f"the state is of step {step!r}; this run has {len(self.timesteps)} steps")
        self._next = step
        self._past = {name: value for name, value in state.items() if name != "next"}

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """Return `sample` moved from this timestep's level to the next, 0 after the last one.

        Arguments as in the base. Anything that the caller (guidance) added to the sample between two steps is
        kept: the corrector, which repeats the previous step from its start, would otherwise lose it.

        Raises:
            RuntimeError: set_timesteps was not called, or the steps are not taken in order.
            ValueError: shapes differ, or `timestep` is not one number.
        """
        index = self._expect_in_order(timestep)
        require_same_shape("model_output", model_output, "sample", sample)
        sigma, next_sigma = self._exact_sigmas[index : index + 2]
        moved = sample.float()
        now = _Prediction(sigma, moved - sigma * model_output.to(sample.device, torch.float32))
        last, before = self._prediction("last"), self._prediction("before")
        if last is not None:
            added = moved - self._past["returned"].float()
            moved = _correct(self._past["sample"], now, last, before) + added
        result = _predict(moved, now, last, next_sigma).to(sample.dtype)
        # A copy, so that a caller who changes the result in place is noticed too.
        self._past = {"sample": moved, "returned": result.detach().clone()}
        for name, kept in (("last", now), ("before", last)):
            self._past |= {} if kept is None else {f"{name}.sigma": kept.sigma, f"{name}.x0": kept.x0}
        self._next = index + 1
        return result

    def _prediction(self, name: str) -> _Prediction | None:
        past = self._past
        return _Prediction(past[f"{name}.sigma"], past[f"{name}.x0"]) if f"{name}.x0" in past else None

    def _expect_in_order(self, timestep: float | Tensor) -> int:
        found = nearest_step(self.timesteps, timestep)
        if self._next == len(self.timesteps):
            raise RuntimeError(f"All {self._next} steps are done: call set_timesteps before the next run")
        # Values are compared, not indices: with very many steps, truncated timesteps repeat.
        if self.timesteps[found] != self.timesteps[self._next]:
            raise RuntimeError(
                f"UniPC steps must be taken in order: step {self._next} is at timestep "
                f"{float(self.timesteps[self._next]):g}, given {float(timestep):g}"
            )
        return self._next


def _log_snr(sigma: float) -> float:
    return math.log1p(-sigma) - math.log(sigma)


def _base(sample: Tensor, last: _Prediction, sigma: float, phi: float) -> Tensor:
    return sigma / last.sigma * sample - (1.0 - sigma) * phi * last.x0


def _predict(sample: Tensor, last: _Prediction, before: _Prediction | None, sigma: float) -> Tensor:
    """UniP: from last.sigma to `sigma`; order 2 with a prediction before the last one, order 1 without."""
    if sigma == 0.0:
        # The last step has order 1, because lambda is infinite at 0: it returns the prediction itself.
        return last.x0
    h = _log_snr(sigma) - _log_snr(last.sigma)
    phi = math.expm1(-h)
    moved = _base(sample, last, sigma, phi)
    if before is None:
        return moved
    r = (_log_snr(before.sigma) - _log_snr(last.sigma)) / h
    return moved - (1.0 - sigma) * phi * (0.5 / r) * (before.x0 - last.x0)


def _correct(sample: Tensor, now: _Prediction, last: _Prediction, before: _Prediction | None) -> Tensor:
    """UniC: repeat the step last -> now, using the prediction at its end.

    Order 2 solves rho_before + rho_now = b1, r * rho_before + rho_now = b2 (arXiv 2302.04867, section 3).
    """
    h = _log_snr(now.sigma) - _log_snr(last.sigma)
    phi = math.expm1(-h)
    moved = _base(sample, last, now.sigma, phi)
    scale = (1.0 - now.sigma) * phi
    if before is None:
        return moved - scale * 0.5 * (now.x0 - last.x0)
    r = (_log_snr(before.sigma) - _log_snr(last.sigma)) / h
    g1 = phi / -h - 1.0
    g2 = g1 / -h - 0.5
    b1, b2 = g1 / phi, 2.0 * g2 / phi
    rho_before = (b1 - b2) / (1.0 - r)
    rho_now = b1 - rho_before
    return moved - scale * ((rho_before / r) * (before.x0 - last.x0) + rho_now * (now.x0 - last.x0))
