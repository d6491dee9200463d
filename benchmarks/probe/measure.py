"""Measure how well a checkpoint's attention motion flow reads true motion: by block, head, noise and tau.

Clips with known motion are encoded and noised; for each block of the DiT, the displacement that its attention
reads at object tokens is compared with the true one. `report` holds the result.
Axes: R readings (each head, then the two head averages), N heads, D head width, F latent frames, H/W token
rows/columns, S = H * W, P frame pairs, M tokens compared. Displacements are (row, column) in tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.probe.report import HEAD_MEANS, ProbeResult
from benchmarks.probe.truth import TrueFlow, agreement, moments_by_distance, true_flow
from benchmarks.synthetic.clips import SceneOptions, SyntheticClip, make_clip
from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import TAU
from diffsynth.configs.resolve import round_size
from diffsynth.data.tensors import video_to_tensor
from diffsynth.models.wan_video_dit import DiTBlock, WanModel
from diffsynth.motion.flow import token_positions
from diffsynth.motion.heads import precise
from diffsynth.pipelines.wan_video import WanVideoPipeline

SIGMAS = (0.95, 0.85, 0.7, 0.5, 0.3)
TAUS = (1.0, 2.0, 4.0, 8.0, 16.0)
PROMPTS = ("", "caption")
# Only motion that is visible: a spinning circle looks the same, and a resting object gives no signal.
PROBE_SCENES = SceneOptions(spin=0, still=0)
# First of three numbers in a clip's seed; other code uses two, so that its clips are different ones.
PROBE_SEED = 101
# A DiT narrower than SMALL_DIM counts as small, made for pictures of SMALL_GRID x SMALL_GRID tokens.
SMALL_DIM = 1024
SMALL_GRID = 8
FULL_SIZE = (480, 832)
NATURAL_LATENT_FRAMES = 5
# Attention weights held in memory at a time.
ATTENTION_BYTES = 64 * 2**20


def read_displacements(q: Tensor, k: Tensor, truth: TrueFlow, taus: Sequence[float]) -> Tensor:
    """Return the displacements that attention motion flow reads at counted tokens, by reading and tau.

    This is `attention_motion_flow` with all heads and taus on the same logits, and only the counted queries.

    Args:
        q: queries [F, H, W, N, D].
        k: keys [F, H, W, N, D].
        truth: true motion and the tokens to compare (`counted`).
        taus: factors on the logits.

    Returns:
        [R, taus, M, 2] in tokens; the readings are the N heads, then HEAD_MEANS.
    """
    q, k = precise(q).flatten(1, 2).transpose(1, 2), precise(k).flatten(1, 2).transpose(1, 2)
    positions = token_positions(truth.counted.shape[1], truth.counted.shape[2], q)
    scale = q.shape[-1] ** -0.5
    at_a_time = max(
        1, ATTENTION_BYTES // ((q.shape[1] + len(HEAD_MEANS)) * len(positions) * q.element_size())
    )
    found = []
    for (i, j), counted in zip(truth.pairs, truth.counted, strict=True):
        queries = torch.from_numpy(counted).flatten().nonzero()[:, 0].to(q.device)
        for some in queries.split(at_a_time):
            of_heads = q[i][:, some] @ k[j].mT * scale
            of_mean_qk = q[i][:, some].mean(0, keepdim=True) @ k[j].mean(0).T * scale
            logits = torch.cat([of_heads, of_mean_qk, of_heads.mean(0, keepdim=True)])
            ends = torch.stack([(tau * logits).softmax(-1) @ positions for tau in taus], dim=1)
            found.append(ends - positions[some])
    return torch.cat(found, dim=2)


def block_features(
    dit: WanModel, latents: Tensor, timestep: Tensor, context: Tensor, blocks: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `WanModel.features` of several blocks in one run of the DiT.

    Args:
        dit: the model.
        latents: [1, C, F, h, w].
        timestep: [1].
        context: [1, L, text_dim].
        blocks: indices of blocks (0-based), ascending.

    Yields:
        (q, k), each [F, H, W, N, D], block by block.
    """
    state = dit.embed(latents, timestep, context)
    for index, module in enumerate(dit.blocks[: blocks[-1] + 1]):
        block = cast(DiTBlock, module)
        if index in blocks:
            q, k = block.queries_keys(state.tokens, state)
            yield q[0].unflatten(0, state.grid), k[0].unflatten(0, state.grid)
        if index < blocks[-1]:
            state = replace(state, tokens=block(state.tokens, state))


def natural_size(pipe: WanVideoPipeline) -> tuple[int, int, int]:
    """Return the (frames, height, width) to probe at.

    These are the ones that the checkpoint's config.json names, else 5 latent frames (17 frames at 4x) of
    480 x 832 pixels, or, for a DiT narrower than 1024, of 8 x 8 tokens.
    """
    frames = pipe.vae.temporal_factor * (NATURAL_LATENT_FRAMES - 1) + 1
    small = pipe.dit.dim < SMALL_DIM
    height, width = (SMALL_GRID * side for side in token_size_of(pipe)) if small else FULL_SIZE
    declared = pipe.defaults.options
    return declared.get("num_frames", frames), declared.get("height", height), declared.get("width", width)


def token_size_of(pipe: WanVideoPipeline) -> tuple[int, int]:
    """Return the (rows, columns) of pixels that a token of this checkpoint covers."""
    rows, cols = (pipe.vae.spatial_factor * side for side in pipe.dit.patch_size[1:])
    return rows, cols


@torch.no_grad()
def probe_motion(
    pipe: WanVideoPipeline,
    *,
    clips: int | Sequence[SyntheticClip] = 8,
    sigmas: Sequence[float] = SIGMAS,
    taus: Sequence[float] = TAUS,
    blocks: Sequence[int] | None = None,
    sf: int = 4,
    tokens: str = "object",
    prompt: str = "",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    scenes: SceneOptions | None = None,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
) -> ProbeResult:
    """Measure how read displacement follows the true one (correlation, slope) by block, reading, sigma, tau.

    Samples are pooled over clips, pairs of frames, tokens and both components.

    Args:
        pipe: the pipeline.
        clips: how many to draw, or the clips themselves.
        sigmas: noise levels in (0, 1]: (1 - sigma) * clean + sigma * noise at timestep 1000 * sigma.
        taus: factors on the logits.
        blocks: indices of blocks of the DiT (0-based); None for all.
        sf: as for `true_flow`.
        tokens: as for `true_flow`.
        prompt: "", which is the prompt used for references, or "caption" for the caption of each clip.
        height: height of drawn clips in pixels; this and the next two default to `natural_size`.
        width: width of drawn clips in pixels.
        num_frames: number of frames of drawn clips.
        scenes: options of drawn clips; None for PROBE_SCENES.
        seed: seed of drawn clips and of the noise; each clip has one noise sample.
        progress: wraps the list of runs of the DiT, one for each clip and noise level.

    Raises:
        ValueError: an argument is out of range, or the clips have no motion; raised before any model runs.
        RuntimeError: features are not finite.
    """
    taus = tuple(map(float, taus))
    sigmas = tuple(map(float, sigmas))
    blocks = _check_options(pipe, sigmas, taus, blocks, prompt)
    if isinstance(clips, int):
        clips = _draw(pipe, clips, height, width, num_frames, scenes, seed)
    else:
        clips = _checked_clips(clips, (height, width, num_frames, scenes))
    token_size, factor = token_size_of(pipe), pipe.vae.temporal_factor
    truths = [
        true_flow(clip, token_size=token_size, temporal_factor=factor, sf=sf, tokens=tokens) for clip in clips
    ]
    blind = agreement(np.sum([moments_by_distance(t, t.blind[t.counted], sf) for t in truths], axis=0))
    latents, contexts = _encode(pipe, clips, prompt)
    sums = _moments(pipe, latents, contexts, truths, blocks, sigmas, taus, sf, seed, progress)
    found = agreement(sums)
    return ProbeResult(
        correlation=found.correlation,
        slope=found.slope,
        partial_correlation=found.partial_correlation,
        partial_slope=found.partial_slope,
        blocks=blocks,
        readings=(*range(pipe.dit.num_heads), *HEAD_MEANS),
        sigmas=sigmas,
        taus=taus,
        blind=float(blind.correlation),
        num_clips=len(clips),
        num_samples=sum(int(truth.counted.sum()) for truth in truths),
        size=clips[0].frames.shape[:3],
        sf=sf,
        tokens=tokens,
        prompt=prompt,
        seed=seed,
    )


def _moments(
    pipe: WanVideoPipeline,
    latents: Sequence[Tensor],
    contexts: Sequence[Tensor],
    truths: Sequence[TrueFlow],
    blocks: Sequence[int],
    sigmas: Sequence[float],
    taus: Sequence[float],
    sf: int,
    seed: int,
    progress: Callable[[Iterable], Iterable],
) -> np.ndarray:
    """Return `moments_by_distance` of each block, reading, noise level and tau, summed over the clips."""
    generator = torch.Generator().manual_seed(seed)
    noises = [torch.randn(z.shape, generator=generator).to(z) for z in latents]
    num_readings = pipe.dit.num_heads + len(HEAD_MEANS)
    sums = np.zeros((len(blocks), num_readings, len(sigmas), len(taus), sf - 1, 4, 4))
    with pipe.residency.using("dit"):
        for c, s in progress([(c, s) for c in range(len(latents)) for s in range(len(sigmas))]):
            noised = (1 - sigmas[s]) * latents[c] + sigmas[s] * noises[c]
            timestep = torch.tensor([1000.0 * sigmas[s]], device=noised.device)
            features = block_features(pipe.dit, noised, timestep, contexts[c], blocks)
            for b, (q, k) in enumerate(features):
                read = read_displacements(q, k, truths[c], taus)
                if not read.isfinite().all():
                    raise RuntimeError(
                        f"block {blocks[b]} gives features that are not finite (DiT in {pipe.dit.dtype})"
                    )
                sums[b, :, s] += moments_by_distance(truths[c], read.cpu().numpy(), sf)
    return sums


def _check_options(
    pipe: WanVideoPipeline,
    sigmas: tuple[float, ...],
    taus: tuple[float, ...],
    blocks: Sequence[int] | None,
    prompt: str,
) -> tuple[int, ...]:
    """Return the blocks to read, in rising order. Raises ValueError for an option out of range."""
    for name, numbers in (("sigmas", sigmas), ("taus", taus)):
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"{name} must be one or more different numbers; got {numbers}")
    if not all(0 < sigma <= 1 for sigma in sigmas):
        raise ValueError(f"sigmas must be in (0, 1]; got {sigmas}")
    for tau in taus:
        check_value("tau", TAU, tau)
    if prompt not in PROMPTS:
        raise ValueError(f"prompt must be '' or 'caption'; got {prompt!r}")
    num_layers = pipe.dit.num_layers
    if blocks is None:
        return tuple(range(num_layers))
    if not blocks or not set(blocks) <= set(range(num_layers)):
        raise ValueError(f"blocks must be in 0..{num_layers - 1} for this DiT; got {list(blocks)}")
    return tuple(sorted(set(blocks)))


def _draw(
    pipe: WanVideoPipeline,
    count: int,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    scenes: SceneOptions | None,
    seed: int,
) -> list[SyntheticClip]:
    if count < 1:
        raise ValueError(f"clips must be at least 1; got {count}")
    natural = natural_size(pipe)
    sides = [own if asked is None else asked for own, asked in zip(natural[1:], (height, width), strict=True)]
    rows, cols = (
        round_size(*side) for side in zip(("height", "width"), sides, token_size_of(pipe), strict=True)
    )
    return [
        make_clip(
            (PROBE_SEED, seed, index),
            num_frames=natural[0] if num_frames is None else num_frames,
            height=rows,
            width=cols,
            options=PROBE_SCENES if scenes is None else scenes,
        )
        for index in range(count)
    ]


def _checked_clips(clips: Sequence[SyntheticClip], drawn: tuple) -> list[SyntheticClip]:
    if any(option is not None for option in drawn):
        raise ValueError("height, width, num_frames and scenes apply to drawn clips only, not to given ones")
    sizes = {clip.frames.shape[:3] for clip in clips}
    if len(sizes) != 1:
        raise ValueError(f"clips must be one or more of the same size; got {sorted(sizes)}")
    return list(clips)


def _encode(
    pipe: WanVideoPipeline, clips: list[SyntheticClip], prompt: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Return clean latents [1, C, F, h, w] and context [1, L, text_dim] of each clip."""
    with pipe.residency.using("vae"):
        latents = [
            pipe.vae.encode(video_to_tensor(clip.frames, *clip.frames.shape[:3]), tiled=True)
            for clip in clips
        ]
    texts = [clip.caption if prompt == "caption" else "" for clip in clips]
    with pipe.residency.using("text_encoder"):
        rows = pipe.prompter.encode_prompt(texts, pipe.text_encoder).to(pipe.device)
    return latents, list(rows[:, None])
