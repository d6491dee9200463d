"""The released code's guided step, written plainly from its description, to be measured against.

What it computes is `MotionGuidance.released()`; how it computes it is here: blocks 0..19 and the head for
features of block 14, each block checkpointed and its self-attention checkpointed again inside, a loop over
frame pairs, windows gathered from an expanded view of all keys.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.models.attention import attention
from diffsynth.models.wan_video_dit import DiTBlock, DiTState, WanModel
from diffsynth.models.wan_video_dit_layers import gated, modulate, modulation_of

BLOCK, LAST_BLOCK, WINDOW, TILE, SF, INNER_STEPS, INTERVAL = 14, 19, 21, (3, 4), 4, 10, 3


def run_block(block: DiTBlock, tokens: Tensor, state: DiTState, capture: list | None) -> Tensor:
    """A block with its self-attention under a checkpoint of its own; optionally captures q and k."""

    def self_attention(x: Tensor) -> Tensor:
        layer = block.self_attn
        q, k = layer.queries_keys(x, state.rope)
        if capture is not None and not capture:
            capture.append((q, k))
        return layer.o(attention(q, k, layer.v(x).unflatten(-1, (layer.num_heads, -1))).flatten(2))

    shift1, scale1, gate1, shift2, scale2, gate2 = modulation_of(block.modulation, state.modulation)
    dtype = state.context.dtype
    x = modulate(block.norm1(tokens), shift1, scale1).to(dtype)
    tokens = gated(tokens, checkpoint(self_attention, x, use_reentrant=False), gate1)
    tokens = tokens + block.cross_attn(block.norm3(tokens).to(dtype), state.context, None)
    return gated(tokens, block.ffn(modulate(block.norm2(tokens), shift2, scale2).to(dtype)), gate2)


def features(dit: WanModel, x: Tensor, timestep: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [F, H, W, d] of block 14, after running all that the released code runs."""
    state, capture = dit.embed(x, timestep, context), []
    tokens = state.tokens
    for index, block in enumerate(dit.blocks[: LAST_BLOCK + 1]):
        wanted = capture if index == BLOCK else None
        tokens = checkpoint(run_block, block, tokens, state, wanted, use_reentrant=False)
    dit.unembed(tokens, state)
    frames, rows, cols = state.grid
    num_heads, width = dit.num_heads, dit.dim // dit.num_heads

    def average(t: Tensor) -> Tensor:
        return t.reshape(-1, num_heads, dit.dim).mean(1).reshape(frames, rows, cols, width)

    return tuple(average(t).float() for t in capture[0])


def positions(rows: int, cols: int, like: Tensor) -> Tensor:
    grid = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack(grid, dim=-1).reshape(-1, 2).to(like)


def pair_flow(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Flow [S, 2], tile by tile, and channel means of the key windows of one pair: q, k [H, W, d]."""
    rows, cols, width = q.shape
    (tile_h, tile_w), radius, scale = TILE, WINDOW // 2, width**-0.5
    flat = k.reshape(-1, width)
    centres = q[tile_h // 2 :: tile_h, tile_w // 2 :: tile_w].reshape(-1, width)
    centre = (centres @ flat.T * scale).softmax(-1) @ positions(rows, cols, q)
    offsets = torch.arange(-radius, radius + 1, device=q.device)
    row = (centre[:, :1] + offsets).clamp(radius, rows - 1 - radius).long()
    col = (centre[:, 1:] + offsets).clamp(radius, cols - 1 - radius).long()
    index = (row[:, :, None] * cols + col[:, None, :]).flatten(1)[:, None, :].expand(-1, width, -1)
    windows = flat[:, :, None].expand(-1, -1, WINDOW**2).gather(0, index)
    queries = (
        q.unflatten(0, (-1, tile_h))
        .unflatten(2, (-1, tile_w))
        .permute(0, 2, 1, 3, 4)
        .flatten(0, 1)
        .flatten(1, 2)
    )
    even = (torch.arange(WINDOW**2, device=q.device) % 2 == 0)[:, None]
    local = positions(WINDOW, WINDOW, q) * even
    weights = (queries @ windows * scale).softmax(-1)
    flow = weights @ local - positions(tile_h, tile_w, q)
    return flow.flatten(0, 1), windows.mean(1)


def motion(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Flow of all pairs [P, S, 2] and the window loss, pair by pair."""
    frames, rows, cols, width = q.shape
    flows, track = [], []
    for i in range(frames):
        windows = []
        for j in range(i, min(frames, i + SF)):
            if i == j:
                weights = (q[i].flatten(0, 1) @ k[j].flatten(0, 1).T * width**-0.5).softmax(-1)
                flows.append(weights @ positions(rows, cols, q) - positions(rows, cols, q))
            else:
                flow, window = pair_flow(q[i], k[j])
                flows.append(flow)
                windows.append(window)
        if len(windows) > 1:
            track.append(torch.stack(windows).diff(dim=0).norm(dim=-1).mean())
    return torch.stack(flows), torch.stack(track).mean()


def guided_step(
    dit: WanModel, latents: Tensor, reference: Tensor, timestep: Tensor, context: Tensor, null_context: Tensor
) -> Tensor:
    """One guided denoising step: latents and the reference at this step's noise level [1, C, F, h, w]."""
    x = latents.clone().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=0.003)
    with torch.no_grad():
        reference_flow, _ = motion(*features(dit, reference, timestep, null_context))
    frames = latents.shape[2]
    weight = torch.linspace(1, 0.8, SF, device=x.device)
    weights = torch.cat([weight[: min(SF, frames - i)] for i in range(frames)])
    for step in range(INNER_STEPS):
        optimizer.param_groups[0]["lr"] = 0.003 - 0.001 * step / INNER_STEPS
        optimizer.zero_grad()
        if step % INTERVAL == 0:
            flow, track = motion(*features(dit, x, timestep, context))
            distance = (flow - reference_flow).square().sum((1, 2))
            (5 * (weights * distance).mean() + track).backward()
            cached = x.grad.clone()
        else:
            (x * cached).sum().backward()
        optimizer.step()
    return x.detach()
