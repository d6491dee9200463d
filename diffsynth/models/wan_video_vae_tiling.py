"""Spatial tiles of a latent grid and their blending, for videos whose full frames do not fit in memory.

A tile holds all frames and is encoded or decoded alone. Overlapping tiles are cross-faded by linear ramps as
wide as the overlap. The middle attention of the VAE sees one tile only, so a blend of several tiles is near
to, but not the same as, the untiled result.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple[int, int]  # first position, position after the last


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns of one tile, in latent units."""

    rows: Span
    cols: Span

    def area(self, unit: int = 1) -> tuple:
        """Index of the tile in a tensor [..., h * unit, w * unit]."""
        return ..., slice(*(unit * n for n in self.rows)), slice(*(unit * n for n in self.cols))


@dataclass(frozen=True, kw_only=True, slots=True)
class TileGrid:
    """Tiles over a picture, in latent units; ValueError unless 1 <= stride <= size on both axes."""

    shape: tuple[int, int]  # of the picture, (rows, columns)
    size: tuple[int, int]  # of a tile; the last one along an axis is cut short
    stride: tuple[int, int]  # from tile to tile

    def __post_init__(self) -> None:
        for name, value in (("tile_size", self.size), ("tile_stride", self.stride)):
            if len(value) != 2 or not all(isinstance(n, int) and n >= 1 for n in value):
                raise ValueError(f"{name} must be two whole numbers of latents, at least 1; got {value}")
        if any(stride > size for stride, size in zip(self.stride, self.size, strict=True)):
            raise ValueError(
                f"tile_stride must not exceed tile_size, or gaps are left; got {self.stride} > {self.size}"
            )

    @classmethod
    def of(
        cls, shape: tuple[int, int], tiled: bool, size: tuple[int, int], stride: tuple[int, int]
    ) -> "TileGrid":
        """Return a grid of such tiles or, unless `tiled`, of one tile."""
        return cls(shape=shape, size=size if tiled else shape, stride=stride if tiled else shape)

    def tiles(self) -> list[Tile]:
        """Return all tiles, row by row."""
        rows, cols = (spans(*axis) for axis in zip(self.shape, self.size, self.stride, strict=True))
        return [Tile(row, col) for row in rows for col in cols]


def spans(length: int, size: int, stride: int) -> list[Span]:
    """Tiles along one axis, up to the first that reaches the end, which is cut short there."""
    starts = range(0, max(length - size, 0) + stride, stride)
    return [(start, min(start + size, length)) for start in starts]


def ramp(span: Span, length: int, border: int, unit: int, device: torch.device | None = None) -> Tensor:
    """Return the weights along an axis of `length`: 1, but (i + 1) / border at the i-th from an inner side.

    There are `unit` of them for each latent position. Where the two ramps of a tile overlap, that of the far
    side holds, as in the released FastVMT code.
    """
    start, stop = span
    weight = torch.ones((stop - start) * unit, device=device)
    rising = torch.arange(1, border * unit + 1, device=device) / (border * unit) if border else weight[:0]
    if start > 0:
        weight[: len(rising)] = rising
    if stop < length:
        weight[len(weight) - len(rising) :] = rising.flip(0)
    return weight


def blend(grid: TileGrid, out: Tensor, unit: int, run: Callable[[Tile], Iterable[Tensor]]) -> Tensor:
    """Fill `out` with the weighted mean of all tiles and return it; only one chunk is alive at a time.

    Args:
        grid: the tiles; unit: rows and columns of `out` for each position of the grid.
        out: float32 zeros [B, C, T, rows * unit, columns * unit].
        run: returns a tile's result as consecutive chunks [B, C, t, rows * unit, columns * unit].
    """
    total = out.new_zeros(out.shape[3:])
    for tile in grid.tiles():
        area = tile.area(unit)
        axes = zip((tile.rows, tile.cols), grid.shape, grid.size, grid.stride, strict=True)
        rows, cols = (ramp(span, length, size - step, unit, out.device) for span, length, size, step in axes)
        weight = torch.minimum(rows[:, None], cols)
        total[area] += weight
        start = 0
        for chunk in run(tile):
            stop = start + chunk.shape[2]
            out[:, :, start:stop][area].add_(weight * chunk)
            start = stop
    return out.div_(total)
