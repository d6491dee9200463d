"""Tile attention motion flow: a coarse look from each tile's centre, then attention inside a window only.

For frames i < j (paper section 3.2): the query at the centre of a th x tw tile attends over all of frame j;
around its expected position lies an l x l window, shifted into the grid; each query of the tile attends
inside its tile's window. Pairs i = j attend over the whole frame.
Cost of a pair: T*S*d + S*l^2*d products, against S^2*d dense. Axes as in `flow`; T tiles, m = th * tw.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import SEARCH_WINDOW, TAU, TILE, Heads
from diffsynth.models.tables import table
from diffsynth.motion.flow import (
    MotionFlow,
    Pairs,
    dense_flow,
    expected_in_windows,
    expected_positions,
    frame_pairs,
    token_positions,
)  # fmt: skip
from diffsynth.motion.heads import reduce_heads
from diffsynth.motion.losses import mean_change, window_means


@dataclass(frozen=True, kw_only=True, slots=True)
class TileFlow(MotionFlow):
    """A flow found in windows."""

    windows: Tensor  # [P', T, 2], top left (row, column) of each tile's window, for the pairs i < j


def tile_motion_flow(
    q: Tensor,
    k: Tensor,
    *,
    sf: int = 4,
    window: int = 21,
    tile: tuple[int, int] = (3, 4),
    tau: float = 1.0,
    windows: Tensor | TileFlow | None = None,
    pairs: Pairs | None = None,
    heads: Heads = "mean_qk",
    chunk: int = 4,
) -> TileFlow:
    """Return the tile flow of features q, k [F, H, W, d] or [F, H, W, n, d].

    Args:
        q, k: queries and keys of one block.
        sf: span of the pairs i <= j < i + sf.
        window: l, side of the search window in tokens, cut to the grid's sides.
        tile: (rows, columns) in tokens; the last ones may be partial.
        tau: factor on the logits.
        windows: an earlier result or its windows, which are used instead of searching.
        pairs: pairs (i, j), sorted by i, then j; by default all within the span.
        heads: see `reduce_heads`.
        chunk: pairs held in memory at a time.

    Raises:
        ValueError: arguments do not fit.
    """
    q, k = reduce_heads(q, k, heads)
    check_value("tau", TAU, tau)
    check_value("window", SEARCH_WINDOW, window)
    check_value("tile", TILE, tile)
    grid = q.shape[1], q.shape[2]
    sides = (min(window, grid[0]), min(window, grid[1]))
    pairs = frame_pairs(len(q), sf) if pairs is None else pairs
    within, between = [p for p in pairs if p[0] == p[1]], [p for p in pairs if p[0] < p[1]]
    if windows is None:
        windows = find_windows(q, k, between, tile, sides, tau, chunk)
    elif isinstance(windows, TileFlow):  # valid; checking its windows would synchronise with the device
        windows = windows.windows
    else:
        num_tiles = prod(-(-side // step) for side, step in zip(grid, tile, strict=True))
        _check_windows(windows, (len(between), num_tiles, 2), grid, sides)
    seen = window_tokens(windows, sides, grid)
    in_window = expected_in_windows(to_tiles(q, tile), k, between, token_positions(*sides, q), seen, tau)
    expected = from_tiles(in_window + windows[:, :, None], tile, grid)
    in_windows = expected - token_positions(*grid, q).unflatten(0, grid)
    flow = torch.cat([dense_flow(q, k, within, tau, chunk), in_windows])
    order = table(pair_order(pairs, within + between), flow.device)
    window_loss = mean_change(window_means(k, between, windows, sides), between)
    return TileFlow(flow=flow[order], pairs=pairs, windows=windows, window_loss=window_loss)


def centre_positions(
    q: Tensor, k: Tensor, pairs: Pairs, tile: tuple[int, int], tau: float, chunk: int
) -> Tensor:
    """Return the expected position in frame j of each tile's centre query, [P, T, 2], of reduced q and k."""
    rows, cols = (  # the centre of a partial tile stays inside the grid
        torch.arange(0, side, step, device=q.device).add(step // 2).clamp(max=side - 1)
        for side, step in zip(q.shape[1:3], tile, strict=True)
    )
    return expected_positions(q[:, rows][:, :, cols].flatten(1, 2), k, pairs, tau, chunk)


@torch.no_grad()
def find_windows(
    q: Tensor, k: Tensor, pairs: Pairs, tile: tuple[int, int], sides: tuple[int, int], tau: float, chunk: int
) -> Tensor:
    """Return the first (row, column) of each tile's window in frame j, [P, T, 2] long, inside the grid."""
    centre = centre_positions(q, k, pairs, tile, tau, chunk).round().long()
    half = table((sides[0] // 2, sides[1] // 2), q.device)
    last = table((q.shape[1] - sides[0], q.shape[2] - sides[1]), q.device)
    return (centre - half).clamp(min=torch.zeros_like(last), max=last)


def to_tiles(x: Tensor, tile: tuple[int, int]) -> Tensor:
    """Cut [F, H, W, d] into tiles [F, T, th * tw, d], padding the grid with zeros to whole tiles."""
    (rows, cols), (th, tw) = x.shape[1:3], tile
    x = F.pad(x, (0, 0, 0, -cols % tw, 0, -rows % th))
    return x.unflatten(2, (-1, tw)).unflatten(1, (-1, th)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_tiles(x: Tensor, tile: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Join tiles [P, T, th * tw, d] of a grid again: [P, H, W, d]."""
    (rows, cols), (th, tw) = grid, tile
    x = x.unflatten(1, (-(-rows // th), -(-cols // tw))).unflatten(3, (th, tw)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :rows, :cols]


def window_tokens(windows: Tensor, sides: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the tokens of each window, row by row: windows [P, T, 2] -> [P, T, L] long."""
    rows = windows[..., :1] + torch.arange(sides[0], device=windows.device)
    cols = windows[..., 1:] + torch.arange(sides[1], device=windows.device)
    return (rows[..., :, None] * grid[1] + cols[..., None, :]).flatten(2)


def pair_order(wanted: Pairs, pairs: Pairs) -> tuple[int, ...]:
    """Return the index of each wanted pair in `pairs`."""
    place = {pair: index for index, pair in enumerate(pairs)}
    return tuple(place[pair] for pair in wanted)


def _check_windows(
    windows: Tensor, shape: tuple[int, int, int], grid: tuple[int, int], sides: tuple[int, int]
) -> None:
    if tuple(windows.shape) != shape:
        raise ValueError(
            f"windows must be {list(shape)}, (row, column) for each pair i < j and tile; "
            f"got {list(windows.shape)}"
        )
    last = (grid[0] - sides[0], grid[1] - sides[1])
    if not ((windows >= 0) & (windows <= table(last, windows.device))).all():
        raise ValueError(f"windows must begin in rows 0..{last[0]} and columns 0..{last[1]}")
