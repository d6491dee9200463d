"""The flow-matching noise schedule, the Euler solver that FastVMT guides, and one for few-step models.

A noised sample is (1 - sigma) * clean + sigma * noise, the network predicts the velocity noise - clean, and
the Euler step moves along it from one sigma to the next. Tables are computed in float64 and kept in float32;
samples move in float32 and come back in their own type.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffsynth.configs.fields import Number, Whole, check_value
from diffsynth.configs.guidance import shifted_level


def nearest_step(timesteps: Tensor, timestep: float | Tensor) -> int:
    """Return the index of the entry of `timesteps` [N] nearest to `timestep`; the first one in a tie.

    Pass timesteps in float32: a timestep near 1000 rounded to bfloat16 is up to 2 units off, enough to hit a
    neighbouring step.

    Raises:
        RuntimeError: the tables are empty, so set_timesteps was not called.
        ValueError: `timestep` holds more than one number.
    """
    if not timesteps.numel():
        raise RuntimeError("The scheduler has no timesteps yet: call set_timesteps first")
    if isinstance(timestep, Tensor):
        if timestep.numel() != 1:
            raise ValueError(f"timestep has the shape {tuple(timestep.shape)}; it must hold one number")
        timestep = timestep.item()
    return int((timesteps - timestep).abs().argmin())


def mix_noise(x: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return (1 - sigma) * x + sigma * noise, in the type and on the device of `x`; both of one shape."""
    require_same_shape("noise", noise, "x", x)
    return ((1.0 - sigma) * x.float() + sigma * noise.to(x.device, torch.float32)).to(x.dtype)


def require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise a ValueError that names both tensors unless they have one shape: broadcasting would hide it."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has the shape {tuple(tensor.shape)}; {other_name} has {tuple(other.shape)}: "
            "they must agree"
        )


class FlowMatchScheduler:
    """Flow-matching noise schedule with Euler steps; the defaults are those of the released FastVMT code.

    Args:
        shift: default shift of the levels, > 0; above 1 they move towards noise.
        sigma_min: lowest level before the shift; sigma_max: the highest.
        extra_one_step: place one more level at sigma_min and drop it, so that the last step starts above
            sigma_min; otherwise the last level is sigma_min itself.
        num_train_timesteps: the timestep at sigma = 1.

    `sigmas` and `timesteps` are float32 [N] on the CPU, descending. The level after the last one is 0 and
    is not in the tables.
    """

    def __init__(
        self,
        shift: float = 5.0,
        sigma_min: float = 0.0,
        extra_one_step: bool = True,
        sigma_max: float = 1.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        self.shift = shift
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.extra_one_step = extra_one_step
        self.num_train_timesteps = num_train_timesteps
        self.sigmas = torch.empty(0)
        self.timesteps = torch.empty(0)
        self._exact_sigmas: list[float] = []  # as Python numbers, with the 0 after the last

    def set_timesteps(
        self, num_inference_steps: int, denoising_strength: float = 1.0, shift: float | None = None
    ) -> None:
        """Compute the tables of one run.

        u is evenly spaced from sigma_min + denoising_strength * (sigma_max - sigma_min) to sigma_min, which
        is left out with `extra_one_step`; sigma = shift * u / (1 + (shift - 1) * u).

        Args:
            num_inference_steps: number of steps, also for a strength below 1.
            denoising_strength: share of the range of u that the steps cover, in (0, 1].
            shift: shift of this run, > 0; None for the scheduler's own.

        Raises:
            ValueError: steps below 1 or not whole, strength outside (0, 1], shift not above 0.
        """
        shift = self.shift if shift is None else shift
        check_value("num_inference_steps", Whole(1), num_inference_steps)
        check_value("denoising_strength", Number(above=0, most=1), denoising_strength)
        check_value("shift", Number(above=0), shift)
        start = self.sigma_min + denoising_strength * (self.sigma_max - self.sigma_min)
        points = num_inference_steps + self.extra_one_step
        u = torch.linspace(start, self.sigma_min, points, dtype=torch.float64)[:num_inference_steps]
        self.set_sigmas(shifted_level(u, shift).tolist())

    def set_sigmas(self, sigmas: Sequence[float]) -> None:
        """Set the tables of one run from its noise levels, which descend, are at most 1 and above 0."""
        self.sigmas = torch.tensor(sigmas)
        self._exact_sigmas = [*self.sigmas.tolist(), 0.0]
        self.timesteps = (torch.tensor(sigmas, dtype=torch.float64) * self.num_train_timesteps).float()

    def state(self) -> dict[str, object]:
        """Return the state that later steps need: none, since an Euler step needs no earlier ones."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state`, after set_timesteps; ValueError if it is that of another scheduler."""
        if state:
            raise ValueError(f"this scheduler keeps nothing; got a state of {', '.join(sorted(state))}")

    def add_noise(self, x: Tensor, noise: Tensor, timestep: float | Tensor) -> Tensor:
        """Return clean samples `x` noised to the level of the nearest timestep, in the type of `x`."""
        return mix_noise(x, noise, self._exact_sigmas[nearest_step(self.timesteps, timestep)])

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor) -> Tensor:
        """Return `sample` moved along the velocity from this timestep's level to the next, 0 after the last.

        Args:
            model_output: velocity, in the shape of `sample`.
            timestep: timestep of the step, one number; the nearest of `timesteps` is taken.
            sample: latents at this level; the result has their type and device.

        Raises:
            RuntimeError: set_timesteps was not called.
            ValueError: shapes differ, or `timestep` is not one number.
        """
        index = nearest_step(self.timesteps, timestep)
        require_same_shape("model_output", model_output, "sample", sample)
        velocity = model_output.to(sample.device, torch.float32)
        return self._moved(index, sample.float(), velocity).to(sample.dtype)

    def _moved(self, index: int, sample: Tensor, velocity: Tensor) -> Tensor:
        return sample + velocity * (self._exact_sigmas[index + 1] - self._exact_sigmas[index])


class RenoiseScheduler(FlowMatchScheduler):
    """Sampler for models distilled with DMD or Self-Forcing: each step re-noises its clean prediction.

    The noise is drawn on the CPU and depends only on `seed` and the step, so a resumed run draws the same.
    """

    def __init__(self, shift: float = 5.0, seed: int = 0) -> None:
        super().__init__(shift)
        self.seed = seed

    def _moved(self, index: int, sample: Tensor, velocity: Tensor) -> Tensor:
        clean = sample - self._exact_sigmas[index] * velocity
        if index + 1 == len(self.sigmas):
            return clean
        digest = hashlib.sha256(f"renoise {self.seed} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        noise = torch.randn(sample.shape, generator=generator)
        return mix_noise(clean, noise, self._exact_sigmas[index + 1])
