"""The denoising loop as plain functions: velocity with classifier-free guidance, then step by step to clean
latents.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.caches.rules import CacheMaker, StepCache, run_blocks_cached
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_layers import SLICE_TOKENS
from diffsynth.vram_management import device_memory

# Of (step, latents [1, C, F, h, w], timestep).
Velocity = Callable[[int, Tensor, Tensor], Tensor]


class Scheduler(Protocol):
    """What the loop needs of a scheduler; see `diffsynth.schedulers`."""

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor: ...


def dit_velocity(
    dit: WanModel, x: Tensor, timestep: Tensor, context: Tensor, caches: Sequence[StepCache] = ()
) -> Tensor:
    """One DiT call for latents x [B, C, F, h, w] at one timestep; with a cache for each of the B samples its
    blocks may be skipped.
    """
    # Without non_blocking, a copy from the CPU waits until the device has done all its work.
    timestep = timestep.to(x.device, non_blocking=True).expand(x.shape[0])
    if not caches:
        return dit(x, timestep, context)
    state = dit.embed(x, timestep, context)
    return dit.unembed(run_blocks_cached(dit, state, caches), state)


def steps_with_cfg(interval: tuple[float, float], num_steps: int) -> range:
    """The steps of a run in which classifier-free guidance is on.

    interval: (from, to) as shares of the run's steps, (0, 1) for all; the bounds are rounded to whole steps
    and the upper one is not included. Raises ValueError unless 0 <= from <= to <= 1.
    """
    numbers = isinstance(interval, tuple | list) and [
        isinstance(n, int | float) and not isinstance(n, bool) for n in interval
    ]
    if numbers != [True, True] or not 0 <= interval[0] <= interval[1] <= 1:
        raise ValueError(f"cfg_interval must be (from, to) with 0 <= from <= to <= 1; got {interval!r}")
    return range(round(interval[0] * num_steps), round(interval[1] * num_steps))


def guided_velocity(
    dit: WanModel,
    positive: Tensor,
    negative: Tensor | None,
    cfg_scale: float,
    *,
    num_steps: int,
    batch: bool,
    cfg_interval: tuple[float, float] = (0.0, 1.0),
    cache: CacheMaker | None = None,
) -> Velocity:
    """The velocity v_neg + cfg_scale * (v_pos - v_neg) as a function of (step, latents, timestep).

    positive, negative: text embeddings [1, L, text_dim]; negative None runs the positive one alone.
    num_steps: of the run. batch: one DiT call with both, else two. cfg_interval: see `steps_with_cfg`; in
    the other steps the positive prompt runs alone. cache: makes one rule for each prompt, of the steps that
    it runs in; the rules decide alike whether the prompts share a call or not.
    """
    guided = steps_with_cfg(cfg_interval, num_steps) if negative is not None else range(0)
    pos_cache: list[StepCache] = []
    neg_cache: list[StepCache] = []
    if cache is not None:
        pos_cache = [cache.make("positive", range(num_steps), num_steps)]
        neg_cache = [cache.make("negative", guided, num_steps)] if guided else []
    both = torch.cat([positive, negative]) if guided and batch else None

    def velocity(step: int, x: Tensor, t: Tensor) -> Tensor:
        if step not in guided:
            return dit_velocity(dit, x, t, positive, pos_cache)
        if both is not None:
            v_both = dit_velocity(dit, x.expand(2, -1, -1, -1, -1), t, both, pos_cache + neg_cache)
            v_pos, v_neg = v_both.chunk(2)
        else:
            v_pos = dit_velocity(dit, x, t, positive, pos_cache)
            v_neg = dit_velocity(dit, x, t, negative, neg_cache)
        return v_neg + cfg_scale * (v_pos - v_neg)

    return velocity


def denoise(
    latents: Tensor,
    scheduler: Scheduler,
    velocity: Velocity,
    *,
    guide: Callable[[int, Tensor, Tensor], Tensor] | None,
    progress: Callable[[Iterable], Iterable],
    on_step_end: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    interrupted: Callable[[], bool],
    first_step: int = 0,
    step_done: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Take noised latents [1, C, F, h, w] through all timesteps of the scheduler.

    guide(index, timestep, latents) may move the latents before a step, and after it on_step_end(index,
    timestep, latents, clean), where clean is what the step's velocity leads to when followed to the end. Once
    interrupted() is true no further step is begun. first_step: of a run that goes on, whose latents are those
    after first_step steps. step_done(steps, latents): told of each step that took its full course.
    """
    for index, timestep in enumerate(progress(scheduler.timesteps[first_step:]), first_step):
        if interrupted():
            break
        if guide is not None:
            latents = guide(index, timestep, latents)
        # An interrupt ends guidance half-way: such a step is not one to go on from.
        cut_short = interrupted()
        v = velocity(index, latents, timestep)
        clean = latents - v * (timestep / 1000)
        latents = on_step_end(index, timestep, scheduler.step(v, timestep, latents), clean)
        if step_done is not None and not cut_short:
            step_done(index + 1, latents)
    return latents


def replaced_latents(returned: object, latents: Tensor) -> Tensor:
    """The latents in what a callback returned. Raises TypeError or ValueError if they cannot replace the
    run's.
    """
    if not isinstance(returned, dict) or not isinstance(returned.get("latents"), Tensor):
        raise TypeError(f"callback_on_step_end must return None or a dict with latents; got {returned!r:.80}")
    if returned["latents"].shape != latents.shape:
        shapes = f"{tuple(returned['latents'].shape)} for {tuple(latents.shape)}"
        raise ValueError(f"callback_on_step_end returned latents of another shape: {shapes}")
    return returned["latents"]


def batch_of_two_fits(dit: WanModel, num_tokens: int, device: torch.device) -> bool:
    """Whether both prompts should share a DiT call: on an accelerator that holds the activations of two.

    Judged by the device's total memory, not by what is free, so that one machine always decides, and rounds,
    alike. On a CPU a batch gains nothing.
    """
    # A slice of the feed-forward's hidden layer, before and after its activation, and about eight tensors of
    # the model's width.
    per_sample = (min(num_tokens, SLICE_TOKENS) * 2 * dit.ffn_dim + num_tokens * 8 * dit.dim) * 4
    weights = sum(t.numel() * t.element_size() for t in dit.state_dict().values())
    return weights + 2 * per_sample < 0.7 * device_memory(device)
