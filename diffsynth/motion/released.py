"""Tile AMF as the released FastVMT code computes it, where that differs from the method (see `tile_flow`).

- Each index of a window, not its centre, is clamped, and then truncated: the border of the grid is never
  looked at and edge keys count several times.
- Keys at odd places of the window keep their probability but count as position (0, 0).
- The displacement is place in the window minus place in the tile: where the window lies does not enter.
- Flow between frames is ordered by tile; the window loss averages keys over channels, not over the window.
"""

import torch
from torch import Tensor

from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import SEARCH_WINDOW, TILE, check_released
from diffsynth.models.tables import table
from diffsynth.motion.flow import (
    MotionFlow,
    Pairs,
    dense_flow,
    expected_in_windows,
    frame_pairs,
    token_positions,
)
from diffsynth.motion.losses import mean_change
from diffsynth.motion.tile_flow import centre_positions, pair_order, to_tiles


def released_tile_flow(
    q: Tensor, k: Tensor, *, sf: int, window: int, tile: tuple[int, int], tau: float, chunk: int = 4
) -> MotionFlow:
    """Return the released flow of reduced features q, k [F, H, W, d]; arguments as in `tile_motion_flow`.

    Its flow is [P, S, 2]: row-major tokens for i = j, for i < j by tile row, tile column, then row and column
    in the tile.

    Raises:
        ValueError: the released code cannot run on this grid.
    """
    check_value("window", SEARCH_WINDOW, window)
    check_value("tile", TILE, tile)
    grid = tuple(q.shape[1:3])
    check_released(grid, tile, window)
    pairs = frame_pairs(len(q), sf)
    within, between = [p for p in pairs if p[0] == p[1]], [p for p in pairs if p[0] < p[1]]
    seen = _released_windows(q, k, between, window, tile, tau, chunk)
    values = token_positions(window, window, q).clone()
    values[1::2] = 0
    in_window = expected_in_windows(to_tiles(q, tile), k, between, values, seen, tau)
    in_frame = dense_flow(q, k, within, tau, chunk).flatten(1, 2)
    flow = torch.cat([in_frame, (in_window - token_positions(*tile, q)).flatten(1, 2)])
    frame = table(tuple(j for _, j in between), k.device)
    channel_means = k.mean(-1).flatten(1)[frame][:, None].expand(-1, seen.shape[1], -1).gather(2, seen)
    order = table(pair_order(pairs, within + between), flow.device)
    return MotionFlow(flow=flow[order], pairs=pairs, window_loss=mean_change(channel_means, between))


@torch.no_grad()
def _released_windows(
    q: Tensor, k: Tensor, pairs: Pairs, window: int, tile: tuple[int, int], tau: float, chunk: int
) -> Tensor:
    """The tokens of each tile's window, [P, T, l * l] long, each index clamped and truncated on its own."""
    rows, cols = q.shape[1:3]
    centre = centre_positions(q, k, pairs, tile, tau, chunk)
    half = window // 2
    offsets = torch.arange(-half, half + 1, device=q.device)
    row = (centre[..., :1] + offsets).clamp(half, rows - 1 - half).long()
    col = (centre[..., 1:] + offsets).clamp(half, cols - 1 - half).long()
    return (row[..., :, None] * cols + col[..., None, :]).flatten(2)
