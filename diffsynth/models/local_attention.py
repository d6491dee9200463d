"""Self-attention in which a token sees only those near it: its cost grows with the tokens, not their square.

Query (f, r, c) attends to the keys with |f' - f| <= wf, |r' - r| <= wr and |c' - c| <= wc; at the borders the
neighbourhood is cut, not shifted. Two ways to the same result: tiles of queries, each with the box of keys
around it, through scaled_dot_product_attention; or FlexAttention, which skips blocks of keys, on a GPU.
Axes: B batch, S = F*H*W tokens by frame, row, column, N heads, D head width, T tiles, m queries of a tile,
L keys of a tile.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import ATTENTION_WINDOW, Window
from diffsynth.models.attention import AttentionBackend, attention
from diffsynth.models.compiled import can_fuse, compiled

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Grid = tuple[int, int, int]
Kernel = Callable[..., Tensor]

LEAST_TILE = (1, 8, 8)  # smaller ones copy more keys, larger ones compute more products that are masked
BLOCK = 128  # tokens that FlexAttention computes or skips together
BAND_ROWS = 8  # with BLOCK, blocks of 8 rows by 16 columns
FLEX_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLEX_LEAST_WIDTH = 16  # of a head


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, window: Window,
    plan: "TilePlan | BlockPlan | None" = None, backend: AttentionBackend | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax(q k^T / sqrt(D)) v over the keys near each query; differentiable.

    Masks and indices are made once per grid and window. A window over the whole grid gives `attention`.

    Args:
        q, k, v: [B, S, N, D], as the result.
        grid: (F, H, W) in tokens.
        window: (frames, rows, columns) that a token sees to each side.
        plan: what `local_plan` returns for it, where compiled code cannot make one.
        backend: as in `attention`, for a window over the whole grid.

    Raises:
        ValueError: the window is not allowed, or the grid has another number of tokens.
    """
    frames, rows, columns = grid
    grid, window = (frames, rows, columns), check_value("attention_window", ATTENTION_WINDOW, window)
    if q.shape[1] != prod(grid) or k.shape != q.shape:
        raise ValueError(
            f"q and k must be [B, S, N, D] with S tokens of the grid {grid}; "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if all(reach >= side - 1 for reach, side in zip(window, grid, strict=True)):
        return attention(q, k, v, backend=backend)
    plan = plan or local_plan(grid, window, q, q.shape[-1])
    if isinstance(plan, BlockPlan):
        return attend_in_blocks(q, k, v, plan, _flex_attention())
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Each key is copied to every tile that sees it: these copies are made again, not kept.
        return checkpoint(attend_in_tiles, q, k, v, plan, use_reentrant=False, preserve_rng_state=False)
    return attend_in_tiles(q, k, v, plan)


def local_plan(grid: Grid, window: Window, like: Tensor, head_dim: int) -> "TilePlan | BlockPlan":
    """Return which tokens are computed together; made once per grid and window, for inputs like a tensor."""
    fits = like.dtype in FLEX_DTYPES and head_dim >= FLEX_LEAST_WIDTH
    make = block_plan if like.is_cuda and fits and can_fuse(like.device) else tile_plan
    return make(grid, window, like.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGroup:
    """Tiles of one shape. queries [T, m] and keys [T, L], long: their tokens; mask [m, L], True where a query
    sees a key, or None if every one does."""

    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class TilePlan:
    """All tiles; queries, keys: their tokens, group after group; positions [S]: of each token in queries."""

    groups: tuple[TileGroup, ...]
    queries: Tensor
    keys: Tensor
    positions: Tensor


@lru_cache(maxsize=8)
@torch.compiler.disable  # made once, in Python
@torch.inference_mode(False)  # a kept plan must also serve calls with gradients
def tile_plan(grid: Grid, window: Window, device: torch.device) -> TilePlan:
    """Cut the grid into tiles, grouped by the shape of what they see. An axis seen whole is not cut."""
    axes = [_spans(*axis) for axis in zip(grid, window, LEAST_TILE, strict=True)]
    by_shape = defaultdict(list)
    for tile in product(*axes):
        shape = tuple((q.stop - q.start, k.stop - k.start, q.start - k.start) for q, k in tile)
        by_shape[shape].append(tuple(zip(*tile, strict=True)))
    tokens = torch.arange(prod(grid)).view(grid)
    groups = []
    for shape, boxes in by_shape.items():
        mask = _box_mask(shape, window)
        groups.append(
            TileGroup(
                queries=torch.stack([tokens[queries].flatten() for queries, _ in boxes]).to(device),
                keys=torch.stack([tokens[keys].flatten() for _, keys in boxes]).to(device),
                mask=None if mask.all() else mask.to(device),
            )
        )
    queries = torch.cat([group.queries.flatten() for group in groups])
    keys = torch.cat([group.keys.flatten() for group in groups])
    return TilePlan(groups=tuple(groups), queries=queries, keys=keys, positions=queries.argsort())


def _spans(side: int, reach: int, least: int) -> list[tuple[slice, slice]]:
    """The tiles along an axis: their range of it, and the range of what they see."""
    step = side if reach >= side - 1 else max(least, reach)
    return [
        (slice(i, min(i + step, side)), slice(max(i - reach, 0), min(i + step + reach, side)))
        for i in range(0, side, step)
    ]


def _box_mask(shapes: tuple[tuple[int, int, int], ...], window: Window) -> Tensor:
    """Which keys each query sees, [m, L]; of each axis: queries, keys, place of the queries in the keys."""
    near_f, near_r, near_c = (
        ((torch.arange(count) + offset)[:, None] - torch.arange(num_keys)).abs() <= reach
        for (count, num_keys, offset), reach in zip(shapes, window, strict=True)
    )
    near = near_f[:, None, None, :, None, None] & near_r[:, None, None, :, None] & near_c[:, None, None, :]
    return near.flatten(0, 2).flatten(1)


def attend_in_tiles(q: Tensor, k: Tensor, v: Tensor, plan: TilePlan) -> Tensor:
    """Local attention tile by tile, all tiles of a shape at once: [B, S, N, D] -> [B, S, N, D]."""
    # Gathered in one go: the backward of a gather fills a whole tensor, so one a group would cost more.
    tokens_first = [x.transpose(0, 1).flatten(1) for x in (q, k, v)]
    tiles = [
        x.index_select(0, index).split([getattr(group, name).numel() for group in plan.groups])
        for x, name, index in zip(
            tokens_first, ("queries", "keys", "keys"), (plan.queries, plan.keys, plan.keys), strict=True
        )
    ]
    seen = []
    for group, *parts in zip(plan.groups, *tiles, strict=True):
        q_heads, k_heads, v_heads = (
            rearrange(x, "(t m) (b n d) -> (t b) n m d", t=len(group.queries), b=len(q), n=q.shape[2])
            for x in parts
        )
        out = F.scaled_dot_product_attention(q_heads, k_heads, v_heads, attn_mask=group.mask)
        seen.append(rearrange(out, "(t b) n m d -> (t m) b n d", b=len(q)))
    return torch.cat(seen).index_select(0, plan.positions).transpose(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockPlan:
    """order [S'], long: the tokens in blocks, filled up with token 0; positions [S]: each token's index
    in it; mask: the blocks to compute, and which tokens see which in them."""

    order: Tensor
    positions: Tensor
    mask: "BlockMask"


@lru_cache(maxsize=8)
@torch.compiler.disable  # made once, in Python
@torch.inference_mode(False)
def block_plan(grid: Grid, window: Window, device: torch.device) -> BlockPlan:
    """Order tokens so that blocks of them are compact, and list the blocks of keys that each one sees.

    What a block sees follows from its extent on each axis, so nothing of the size S x S is made.
    """
    from torch.nn.attention.flex_attention import BlockMask

    order = _snake(grid)
    positions, missing = order.argsort(), -len(order) % BLOCK
    at = torch.stack(torch.unravel_index(order, grid))
    # What fills up the last block lies out of every window but its own.
    at = F.pad(at, (0, missing), value=-sum(grid) - sum(window)).to(device, torch.int32)
    frame, row, col = at
    reach_f, reach_r, reach_c = window

    def near(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_frames = (frame[query] - frame[key]).abs() <= reach_f
        in_rows = (row[query] - row[key]).abs() <= reach_r
        return in_frames & in_rows & ((col[query] - col[key]).abs() <= reach_c)

    low, high = at.unflatten(1, (-1, BLOCK)).aminmax(dim=-1)
    reach = torch.tensor(window, device=device)[:, None, None]
    gap = torch.maximum(low[:, :, None] - high[:, None], low[:, None] - high[:, :, None])
    extent = torch.maximum(high[:, :, None] - low[:, None], high[:, None] - low[:, :, None])
    whole = (extent <= reach).all(0)
    partial = (gap <= reach).all(0) & ~whole
    mask = BlockMask.from_kv_blocks(
        *_block_list(partial), *_block_list(whole), BLOCK_SIZE=BLOCK, mask_mod=near
    )
    return BlockPlan(order=F.pad(order, (0, missing)).to(device), positions=positions.to(device), mask=mask)


def _snake(grid: Grid) -> Tensor:
    """All tokens, [S] long, so that consecutive ones are neighbours: by frame, band of rows and column."""
    frames, rows, cols = grid
    bands = -(-rows // BAND_ROWS)
    frame, row, col = torch.unravel_index(torch.arange(frames * rows * cols), grid)
    band = row // BAND_ROWS
    band = torch.where(frame % 2 == 0, band, bands - 1 - band)
    col = torch.where((frame * bands + band) % 2 == 0, col, cols - 1 - col)
    return (((frame * bands + band) * cols + col) * BAND_ROWS + row % BAND_ROWS).argsort()


def _block_list(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """wanted [Q, K] bool -> how many blocks each row wants, [1, 1, Q], and which, first, [1, 1, Q, K]."""
    which = wanted.int().argsort(dim=-1, descending=True, stable=True)
    return wanted.sum(-1)[None, None].int(), which[None, None].int()


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kernel: Kernel) -> Tensor:
    """Local attention by a kernel called as `flex_attention` is: [B, S, N, D] -> [B, S, N, D]."""
    in_order = (x.index_select(1, plan.order).transpose(1, 2) for x in (q, k, v))
    return kernel(*in_order, block_mask=plan.mask).transpose(1, 2).index_select(1, plan.positions)


def _flex_attention() -> Kernel:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if torch.compiler.is_compiling() else compiled(flex_attention, dynamic=False)
