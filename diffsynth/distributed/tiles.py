"""Spread the VAE's tiles over N ranks: each computes and broadcasts every N-th tile, and all blend them."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from diffsynth.models.wan_video_vae_tiling import Tile, TileGrid, blend


def spread_blend(grid: TileGrid, out: Tensor, unit: int, run: Callable[[Tile], Iterable[Tensor]]) -> Tensor:
    """Return the result of `blend`, bit-identical.

    If a video is decoded (`unit` > 1) in a single tile, rank 0 alone decodes; others return `out` as it is.
    """
    tiles, rank, ranks = grid.tiles(), dist.get_rank(), dist.get_world_size()
    own: dict[Tile, Tensor] = {}

    def result(tile: Tile) -> list[Tensor]:
        index = tiles.index(tile)
        if index % ranks == 0:  # one for each rank, at the same time
            own.update((mine, torch.cat([*run(mine)], dim=2)) for mine in tiles[index:][rank : rank + 1])
        found = own.pop(tile) if tile in own else out.new_empty(out[tile.area(unit)].shape)
        dist.broadcast(found, index % ranks)
        return [found]

    whole = len(tiles) == 1
    return out if whole and rank and unit > 1 else blend(grid, out, unit, run if whole else result)
