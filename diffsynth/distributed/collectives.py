"""Differentiable communication between the P ranks of a group, which all call it, in the same order.

Tensors are split or joined along their first axis.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup
# Renamed in torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Collective(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable, back: Callable, group: Group) -> Tensor:
        ctx.back, ctx.group = back, group
        return run(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.back(gradient, ctx.group), None, None, None


def exchanged(x: Tensor, group: Group) -> Tensor:
    """Send row p of x [P, ...] to rank p: row p of the result is rank p's for this one."""
    return _Collective.apply(x, _exchange, _exchange, group)


def gathered(x: Tensor, group: Group) -> Tensor:
    """Join the rows of all ranks, which use them differently: backward, their gradients are summed."""
    return _Collective.apply(x, _join, _scatter, group)


def collected(x: Tensor, group: Group) -> Tensor:
    """Join the rows of all ranks, which then compute the same: each keeps its part of the gradient."""
    return _Collective.apply(x, _join, _own_rows, group)


def summed(x: Tensor, group: Group) -> Tensor:
    """Sum over ranks that then compute the same; backward, each has the whole gradient already."""
    return _Collective.apply(x, _sum, lambda gradient, _: gradient, group)


def sum_gradients(x: Tensor, group: Group) -> Tensor:
    """Return x itself, equal on all ranks; backward, sum the gradients that the ranks found for their tokens.

    Here alone the gradient of the latents becomes whole: a rank's own is that of its share of the tokens.
    """
    return _Collective.apply(x, lambda same, _: same.view_as(same), _sum, group)


def check_equal(x: Tensor, name: str, group: Group) -> None:
    """Raise RuntimeError unless a tensor has the same values on all ranks, in float32."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten().long()
    weights = torch.arange(1, 2 * len(bits), 2, device=x.device)  # so that the order counts
    sums = _join((bits * weights).sum()[None], group).tolist()
    if different := [rank for rank, value in enumerate(sums) if value != sums[0]]:
        raise RuntimeError(f"{name} of rank(s) {different} are not those of rank 0: the run cannot continue")


def _own_rows(x: Tensor, group: Group) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def _exchange(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous()
    dist.all_to_all_single(out := torch.empty_like(x), x, group=group)
    return out


def _join(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def _scatter(x: Tensor, group: Group) -> Tensor:
    out = x.new_empty(len(x) // dist.get_world_size(group), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def _sum(x: Tensor, group: Group) -> Tensor:
    dist.all_reduce(out := x.clone(memory_format=torch.contiguous_format), group=group)
    return out
