"""The VAE's tiles over all ranks: each computes every N-th one, and all blend what each has found."""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from diffsynth.models.wan_video_vae_tiling import Tile, TileGrid, blend


def spread_blend(grid: TileGrid, out: Tensor, unit: int, run: Callable[[Tile], Iterable[Tensor]]) -> Tensor:
    """Return what `blend` does, bit-identical; a video is decoded whole on rank 0 alone, else zeros."""
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
