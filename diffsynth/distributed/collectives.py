"""Differentiable communication between the ranks of a group.

Each function names what is done forward and backward; all ranks of the group must call it, in the same order.
P: number of ranks. Tensors are split or joined along their first axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
Map = Callable[[Tensor], Tensor]
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Map, back: Map) -> Tensor:
        ctx.back = back
        return run(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.back(gradient), None, None


def exchanged(x: Tensor, sent: Sequence[int], received: Sequence[int], group: Group) -> Tensor:
    """Send rows to each rank and receive rows from each; backward, the gradients take the way back.

    Args:
        sent: number of rows of x for each rank, in order.
        received: number of rows from each rank.
    """

    def move(outwards: Sequence[int], inwards: Sequence[int]) -> Map:
        def run(rows: Tensor) -> Tensor:
            out = rows.new_empty(sum(inwards), *rows.shape[1:])
            dist.all_to_all_single(out, rows.contiguous(), list(inwards), list(outwards), group=group)
            return out

        return run

    return _Collective.apply(x, move(sent, received), move(received, sent))


def gathered(x: Tensor, group: Group) -> Tensor:
    """Join the rows of all ranks, which use them differently: backward, their gradients are summed."""

    def scatter(gradient: Tensor) -> Tensor:
        out = gradient.new_empty(x.shape)
        _reduce_scatter(out, gradient.contiguous(), group=group)
        return out

    return _Collective.apply(x, lambda rows: _joined(rows, group), scatter)


def collected(x: Tensor, group: Group) -> Tensor:
    """Join the rows of all ranks, which then compute the same: each keeps its part of the gradient."""
    own = slice(len(x) * dist.get_rank(group), len(x) * (dist.get_rank(group) + 1))
    return _Collective.apply(x, lambda rows: _joined(rows, group), lambda gradient: gradient[own])


def summed(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks that then compute the same; backward, each has the whole gradient already."""
    return _Collective.apply(x, lambda part: _total(part, group), lambda gradient: gradient)


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """Return x itself, equal on all ranks; backward, sum the gradients that the ranks found for their tokens.

    This is the one place where the gradient of the latents becomes whole: a rank's own is that of its share
    of the tokens alone.
    """
    return _Collective.apply(x, lambda same: same.view_as(same), lambda gradient: _total(gradient, group))


def check_equal(x: Tensor, name: str, group: Group) -> None:
    """Raise RuntimeError unless a float32 tensor has the same bits on all ranks."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten().long()
    odd = torch.arange(1, 2 * len(bits), 2, device=x.device)  # so that the order counts
    sums = _joined((bits * odd).sum()[None], group).tolist()
    if len(set(sums)) > 1:
        different = [rank for rank, value in enumerate(sums) if value != sums[0]]
        raise RuntimeError(f"{name} of rank(s) {different} are not those of rank 0: the run cannot continue")


def _joined(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def _total(x: Tensor, group: Group) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
