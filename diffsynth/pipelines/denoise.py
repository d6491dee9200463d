"""The denoising loop as plain functions: velocity with classifier-free guidance, then step by step to clean
latents.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_layers import SLICE_TOKENS
from diffsynth.pipelines.tea_cache import TeaCache
from diffsynth.vram_management import device_memory

Velocity = Callable[[Tensor, Tensor], Tensor]


class Scheduler(Protocol):
    """What the loop needs of a scheduler; see `diffsynth.schedulers`."""

    timesteps: Tensor

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor: ...


def dit_velocity(
    dit: WanModel, x: Tensor, timestep: Tensor, context: Tensor, cache: TeaCache | None
) -> Tensor:
    """One DiT call for latents x [B, C, F, h, w] at one timestep; with a cache its blocks may be skipped."""
    timestep = timestep.to(x.device).expand(x.shape[0])
    if cache is None:
        return dit(x, timestep, context)
    state = dit.embed(x, timestep, context)
    if cache.should_compute(state.modulation):
        tokens = dit.run_blocks(state)
        cache.store(tokens - state.tokens)
    else:
        tokens = state.tokens + cache.residual
    return dit.unembed(tokens, state)


def guided_velocity(
    dit: WanModel,
    positive: Tensor,
    negative: Tensor | None,
    cfg_scale: float,
    *,
    batch: bool,
    make_cache: Callable[[], TeaCache | None],
) -> Velocity:
    """The velocity v_neg + cfg_scale * (v_pos - v_neg) as a function of (latents [1, C, F, h, w], timestep).

    positive, negative: text embeddings [1, L, text_dim]; negative None runs the positive one alone. batch:
    one DiT call with both, else two. make_cache: a new TeaCache, or None, for each series of DiT calls.
    """
    if negative is None:
        cache = make_cache()
        return lambda x, t: dit_velocity(dit, x, t, positive, cache)
    if batch:
        cache, both = make_cache(), torch.cat([positive, negative])

        def batched(x: Tensor, t: Tensor) -> Tensor:
            v_pos, v_neg = dit_velocity(dit, x.expand(2, -1, -1, -1, -1), t, both, cache).chunk(2)
            return v_neg + cfg_scale * (v_pos - v_neg)

        return batched
    cache_pos, cache_neg = make_cache(), make_cache()

    def in_turn(x: Tensor, t: Tensor) -> Tensor:
        v_pos = dit_velocity(dit, x, t, positive, cache_pos)
        v_neg = dit_velocity(dit, x, t, negative, cache_neg)
        return v_neg + cfg_scale * (v_pos - v_neg)

    return in_turn


def denoise(
    latents: Tensor,
    scheduler: Scheduler,
    velocity: Velocity,
    *,
    guide: Callable[[int, Tensor, Tensor], Tensor] | None,
    progress: Callable[[Iterable], Iterable],
    on_step_end: Callable[[int, Tensor, Tensor], Tensor],
    interrupted: Callable[[], bool],
) -> Tensor:
    """Take noised latents [1, C, F, h, w] through all timesteps of the scheduler.

    guide(index, timestep, latents) may move the latents before a step, on_step_end(index, timestep, latents)
    may after it; once interrupted() is true no further step is begun.
    """
    for index, timestep in enumerate(progress(scheduler.timesteps)):
        if interrupted():
            break
        if guide is not None:
            latents = guide(index, timestep, latents)
        latents = scheduler.step(velocity(latents, timestep), timestep, latents)
        latents = on_step_end(index, timestep, latents)
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
