"""Count what a run computes before it starts: full forwards of the DiT (FFE) and operations.

A forward of a block over S tokens, each of which sees K, with L text tokens and width D:

    2 S (6 D^2 + 2 D ffn) + 4 D^2 L + 4 S K D + 4 S L D

linear layers on tokens and on text, self-attention, cross-attention; L counts a picture's tokens, too. In FFE
a backward counts as two forwards; its operations are fewer where linear layers weigh most, as weights take no
gradient. Flow and losses, well under 1 % of a guided step, are not counted.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from diffsynth.caches.rules import Probe, make_rule
from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.kinds import CacheMaker
from diffsynth.configs.options import RunOptions
from diffsynth.models.local_attention import BLOCK, Window, block_plan
from diffsynth.models.wan_video_vae_layers import IMAGE_CHANNELS
from diffsynth.models.wan_video_vae_tiling import TileGrid
from diffsynth.planning.memory import Shape, num_tokens, token_grid
from diffsynth.planning.settings import KEEPING
from diffsynth.planning.sizes import DiTSize, VAESize

ATTENTION_BACKWARD = 2.5  # of the forward: five products for two
NOTHING_SEEN = Probe(modulation=torch.empty(0), residual=None)  # for rules that look at no tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCount:
    """Cost of a run's denoising. *_ffe: in full forwards of the DiT; flops: floating point operations, and
    vae_flops those of encoding and decoding besides.
    """

    sampling_ffe: float
    guidance_ffe: float
    flops: float
    vae_flops: float = 0.0

    @property
    def total_ffe(self) -> float:
        return self.sampling_ffe + self.guidance_ffe


def run_cost(dit: DiTSize, latents: Shape, options: RunOptions, checkpoint: str | None = None) -> RunCount:
    """Count a run over latents (F, h, w), from its resolved options.

    Steps that a cache skips by their number alone are left out; other caches look at tensors, and all their
    steps count: an upper bound. `checkpoint` is what the guidance pass keeps, if not what the options say;
    "auto" counts as "none".
    """
    num_steps, motion, guided = options.num_inference_steps, options.motion, options.cfg_steps
    full, skipped = forward_flops(dit, latents), embedding_flops(dit, latents)
    computed: float = computed_steps(options.cache, "positive", range(num_steps), num_steps)
    computed += computed_steps(options.cache, "negative", guided, num_steps)
    flops = computed * full + (num_steps + len(guided) - computed) * skipped
    if (second := options.second_pass) is not None:
        added = run_cost(dit, latents, second)
        computed, flops = computed + added.sampling_ffe, flops + added.flops
    if motion is None:
        return RunCount(sampling_ffe=computed, guidance_ffe=0.0, flops=flops)
    kept = motion.checkpoint if checkpoint is None else checkpoint
    again, share = _computed_again(dit, latents, motion, kept), guided_share(dit, latents, motion)
    ffe = guidance_cost(motion, dit.num_layers, num_steps, share=share, again=again)
    references, gradients = guidance_passes(motion, num_steps)
    if not DESCRIPTORS[motion.mode].needs_backward:
        flops += ffe * full
    else:
        forward, backward = guided_flops(dit, latents, motion)
        flops += (references + gradients * (1 + again)) * forward + gradients * backward
    return RunCount(sampling_ffe=computed, guidance_ffe=ffe, flops=flops)


def vae_flops(vae: VAESize, latents: Shape, options: RunOptions, tiled: bool, with_reference: bool) -> float:
    """Operations of decoding latents (F, h, w) and, with a reference, of encoding it, in tiles or whole."""
    tiles = TileGrid.of(latents[1:], tiled, options.tile_size, options.tile_stride).tiles()
    areas = [(tile.rows[1] - tile.rows[0]) * (tile.cols[1] - tile.cols[0]) for tile in tiles]
    last, sums = vae.widths[-1], 0.0
    for area in areas:
        # Two residual blocks and an attention within each frame; then the layers beside the latents.
        middle = 4 * 27 * last**2 + 4 * last**2 + 2 * area * last
        beside = 27 * last * vae.z_dim + vae.z_dim**2
        sums += latents[0] * area * (middle + beside) + _decoder_sums(vae, latents[0], area)
        if with_reference:
            sums += latents[0] * area * (middle + 2 * beside) + _encoder_sums(vae, latents[0], area)
    return 2 * sums


def _encoder_sums(vae: VAESize, frames: int, area: int) -> float:
    """Products of the encoder's levels, from the pixels of `frames` latent frames of `area` places down."""
    area, frames = area * 4 ** len(vae.temporal), (frames - 1) * 2 ** sum(vae.temporal) + 1
    channels, sums = vae.widths[0], frames * area * 27 * IMAGE_CHANNELS * vae.widths[0]
    for level, width in enumerate(vae.widths):
        sums += frames * area * _block_sums(channels, width, vae.num_res_blocks)
        channels = width
        if level < len(vae.temporal):
            area //= 4
            sums += frames * area * 9 * width**2
            if vae.temporal[level]:
                frames = (frames + 1) // 2
                sums += (frames - 1) * area * 3 * width**2
    return sums


def _decoder_sums(vae: VAESize, frames: int, area: int) -> float:
    """Products of the decoder's levels, from latent frames to pixels."""
    channels, sums = vae.widths[-1], 0
    for level, width in enumerate(vae.widths[::-1]):
        sums += frames * area * _block_sums(channels, width, vae.num_res_blocks + 1)
        channels = width
        if level < len(vae.temporal):
            if vae.temporal[::-1][level]:
                sums += (frames - 1) * area * 6 * width**2
                frames = 2 * frames - 1
            area, channels = 4 * area, width // 2
            sums += frames * area * 9 * width * channels
    return sums + frames * area * 27 * channels * IMAGE_CHANNELS


def _block_sums(channels: int, width: int, count: int) -> int:
    """Products a position of residual blocks in a row, the first of which changes the width."""
    return channels * width * (27 + (channels != width)) + 27 * width**2 * (2 * count - 1)


def computed_steps(cache: CacheOptions | CacheMaker | None, prompt: str, steps: range, num_steps: int) -> int:
    """Count the steps of a prompt in which the blocks run, as far as the cache decides by their number."""
    if not steps or not isinstance(cache, CacheOptions) or not CACHES[cache.name].by_count:
        return len(steps)
    rule = make_rule(cache, prompt, steps, num_steps)
    return sum(rule.decide(NOTHING_SEEN) for _ in steps)


def guidance_passes(motion: MotionGuidance, num_steps: int) -> tuple[int, int]:
    """Passes over the reference and gradients of a run; where tensors decide, the most there can be."""
    steps = len(motion.guided_range(num_steps))
    if motion.recompute_below is None:
        steps = math.ceil(steps / motion.recompute_every)
    fresh = math.ceil(motion.inner_steps / motion.interval)
    return steps, steps * (fresh if motion.reuse_above is None else motion.inner_steps)


def guidance_cost(
    motion: MotionGuidance,
    num_layers: int,
    num_steps: int,
    gradient_evaluations: float | None = None,
    *,
    share: float = 1.0,
    again: float = 0.0,
) -> float:
    """Return what a run's guidance costs, in full forwards of the DiT (FFE), by count.

    A backward counts as two forwards, and blocks after the one that is read do not run. Flow takes one
    forward up to that block for the reference in each guided step that computes gradients, and one with its
    backward for each gradient. FlowMotion takes one full forward for the reference, one or with guidance two
    for each gradient, and no backward.

    Args:
        motion, num_layers, num_steps: the guidance, the blocks of the DiT, the steps of the run.
        gradient_evaluations: number of gradients of the run, if known; by default as `motion` plans them.
        share: cost of a guided pass through the blocks that are run, of a full one (see `guided_share`).
        again: share of a forward that is computed again in each backward, 1 for all of it.
    """
    references, planned = guidance_passes(motion, num_steps)
    gradients = planned if gradient_evaluations is None else gradient_evaluations
    if not DESCRIPTORS[motion.mode].needs_backward:
        return references + gradients * (1 if motion.prediction_cfg == 1 else 2)
    passes = references + (3 + again) * gradients
    return share * passes * motion.block_for(num_layers) / num_layers


def _computed_again(dit: DiTSize, latents: Shape, motion: MotionGuidance, checkpoint: str) -> float:
    """Share of a guided forward that is computed again if the pass keeps what `checkpoint` says."""
    if checkpoint != "attention" or motion.attention_window is not None:
        return float(checkpoint in KEEPING[1:])
    tokens = num_tokens(dit, latents, motion.coarse)
    return 1 - 4 * tokens**2 * dit.dim / block_flops(dit, tokens, tokens)


def guided_share(dit: DiTSize, latents: Shape, motion: MotionGuidance) -> float:
    """Operations of a block in the guided pass, with its coarse grid and window, of those of a full one."""
    if not DESCRIPTORS[motion.mode].needs_backward:
        return 1.0
    tokens = num_tokens(dit, latents)
    return _guided_block(dit, latents, motion) / block_flops(dit, tokens, tokens)


def block_flops(dit: DiTSize, tokens: int, seen: float) -> float:
    """Operations of a block's forward over `tokens` tokens that see `seen` each: the formula above."""
    linear = 2 * tokens * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)
    text = 4 * dit.dim**2 * dit.context_len
    return linear + text + 4 * tokens * dit.dim * (seen + dit.context_len)


def embedding_flops(dit: DiTSize, latents: Shape) -> float:
    """Operations of a forward outside the blocks: embeddings of latents, text and time, and the head."""
    patch = prod(dit.patch_size)
    tokens = num_tokens(dit, latents)
    time = dit.freq_dim * dit.dim + 7 * dit.dim**2
    text = dit.text_len * (dit.text_dim + dit.dim) * dit.dim
    return 2 * (tokens * dit.dim * patch * (dit.in_dim + dit.out_dim) + text + time)


def forward_flops(dit: DiTSize, latents: Shape) -> float:
    """Operations of a full forward."""
    tokens = num_tokens(dit, latents)
    return embedding_flops(dit, latents) + dit.num_layers * block_flops(dit, tokens, tokens)


def guided_flops(dit: DiTSize, latents: Shape, motion: MotionGuidance) -> tuple[float, float]:
    """Operations of a guided pass up to queries and keys of the block that is read, and of its backward.

    Backward, a linear layer on tokens costs what it costs forward, one on text nothing, attention 2.5 times.
    """
    grid = token_grid(dit, latents, motion.coarse)
    tokens, num_blocks = prod(grid), motion.block_for(dit.num_layers)
    read = 4 * tokens * dit.dim**2
    patches = 2 * tokens * dit.dim * prod(dit.patch_size) * dit.in_dim
    coarse = (latents[0], grid[1] * dit.patch_size[1], grid[2] * dit.patch_size[2])
    head = 2 * tokens * dit.dim * prod(dit.patch_size) * dit.out_dim
    forward = num_blocks * _guided_block(dit, latents, motion) + read + embedding_flops(dit, coarse) - head
    attention = 4 * tokens * dit.dim * (_seen(grid, motion.attention_window) + dit.context_len)
    linear = 2 * tokens * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)
    backward = num_blocks * (linear + ATTENTION_BACKWARD * attention) + read + patches
    return forward, backward


def _guided_block(dit: DiTSize, latents: Shape, motion: MotionGuidance) -> float:
    grid = token_grid(dit, latents, motion.coarse)
    return block_flops(dit, prod(grid), _seen(grid, motion.attention_window))


@lru_cache(maxsize=32)
def _seen(grid: Shape, window: Window | None) -> float:
    """Keys that are computed for a query, on average: FlexAttention works on whole blocks."""
    if window is None or all(reach >= side - 1 for reach, side in zip(window, grid, strict=True)):
        return prod(grid)
    mask = block_plan(grid, window, torch.device("cpu")).mask
    blocks = mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()
    return min(BLOCK * blocks.item() / mask.kv_num_blocks.numel(), prod(grid))
