"""Attention motion flow (AMF): where, on average, a token of one frame looks in another.

    A_ij = softmax(tau * Q_i K_j^T / sqrt(d)),    flow_ij[s] = sum_s' A_ij[s, s'] * pos(s') - pos(s)

(paper section 3). Axes: F latent frames, H/W token rows/columns, S = H*W, P frame pairs, T groups of
queries, m queries of a group, L keys that a group sees. Positions are (row, column) in tokens. Everything
goes through `expected_values`, which holds the keys of at most `chunk` pairs at a time, forward and backward.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import TAU, Heads
from diffsynth.motion.heads import reduce_heads

Pairs = Sequence[tuple[int, int]]

# On a CPU, keys and attention weights at hand take no more than this, so that they stay in its last cache;
# much smaller pieces lose more to threads that wait for each other.
CPU_CACHE_BYTES = 12 * 2**20


def frame_pairs(num_frames: int, sf: int) -> list[tuple[int, int]]:
    """Frame pairs i <= j < i + sf that exist, in order of i, then j. Raises ValueError below 1."""
    for name, given in (("num_frames", num_frames), ("sf", sf)):
        if not isinstance(given, int) or given < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {given!r}")
    return [(i, j) for i in range(num_frames) for j in range(i, min(num_frames, i + sf))]


def token_positions(rows: int, cols: int, like: Tensor) -> Tensor:
    """(row, column) of each token of a grid, [rows * cols, 2], in the dtype and on the device of `like`."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack(grid, dim=-1).flatten(0, 1).to(like)


@dataclass(frozen=True, kw_only=True, slots=True)
class Lookup:
    """Who looks where, look by look: one look is one group of m queries attending over its L keys.

    queries [N], long: the group of each look, of the flattened F * T. key_frames [N], long, and seen [N, L],
    long: the frame and its tokens that the look sees. values [L, 2]: what attention averages.
    frame_tokens: S. scale: the factor on q . k.
    """

    queries: Tensor
    key_frames: Tensor
    seen: Tensor
    values: Tensor
    frame_tokens: int
    scale: float

    def key_index(self, at: slice) -> Tensor:
        """The rows that some looks see of the keys flattened to [F * S, d]: [B * L]."""
        return (self.key_frames[at, None] * self.frame_tokens + self.seen[at]).flatten()


class _ExpectedValues(torch.autograd.Function):
    """Attention weights and gathered keys live for some looks; the backward pass computes them again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, lookup: Lookup, at_a_time: int) -> Tensor:
        ctx.lookup, ctx.at_a_time = lookup, at_a_time
        out = q.new_empty(len(lookup.queries), q.shape[1], 2)
        # Sums of many small shares: around their middle they lose fewer digits.
        middle = lookup.values.mean(0)
        for at, attention, *_ in _attend(q, k, lookup, at_a_time):
            torch.matmul(attention, lookup.values - middle, out=out[at])
        out += middle
        ctx.save_for_backward(q, k, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q, k, out = ctx.saved_tensors
        lookup = ctx.lookup
        grad_q, grad_k = torch.zeros_like(q), torch.zeros_like(k)
        for at, attention, queries, keys, key_index in _attend(q, k, lookup, ctx.at_a_time):
            # d expected / d logit_p = attention_p * (value_p - expected)
            logits = (grad[at] @ lookup.values.T).sub_((grad[at] * out[at]).sum(-1, keepdim=True))
            logits.mul_(attention).mul_(lookup.scale)
            grad_q.index_add_(0, lookup.queries[at], logits @ keys)
            torch.bmm(logits.mT, queries, out=keys)
            grad_k.index_add_(0, key_index, keys.flatten(0, 1))
        return grad_q, grad_k, None, None


def _attend(q: Tensor, k: Tensor, lookup: Lookup, at_a_time: int) -> Iterator[tuple]:
    """Of B looks at a time: slice, attention [B, m, L], queries [B, m, d], keys [B, L, d], key index [B * L].

    All of them gather their keys into the same memory.
    """
    count, num_keys = len(lookup.queries), len(lookup.values)
    buffer = k.new_empty(min(at_a_time, count) * num_keys, k.shape[-1])
    for start in range(0, count, at_a_time):
        at = slice(start, start + at_a_time)
        key_index = lookup.key_index(at)
        keys = torch.index_select(k, 0, key_index, out=buffer[: len(key_index)]).unflatten(0, (-1, num_keys))
        queries = q[lookup.queries[at]]
        yield at, (queries @ keys.mT).mul_(lookup.scale).softmax(-1), queries, keys, key_index


def expected_values(
    q: Tensor, k: Tensor, pairs: Pairs, values: Tensor, tau: float, chunk: int, seen: Tensor | None = None
) -> Tensor:
    """Mean of `values` under attention of groups of queries: q [F, T, m, d], k [F, H, W, d] -> [P, T, m, 2].

    Of pair (i, j), the queries of frame i look at the keys of frame j: group t at those in seen [P, T, L],
    long, tokens of the frame, which may repeat; None: at all of them. values [L, 2]: of the keys seen, in
    order. chunk: pairs held in memory at a time. Raises ValueError if it is below 1.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of frame pairs, at least 1; got {chunk!r}")
    groups, device = q.shape[1], q.device
    i, j = torch.tensor(pairs, device=device, dtype=torch.long).reshape(-1, 2).unbind(1)
    if seen is None:
        seen = torch.arange(len(values), device=device).expand(len(pairs), groups, -1)
    lookup = Lookup(
        queries=(i[:, None] * groups + torch.arange(groups, device=device)).flatten(),
        key_frames=j.repeat_interleave(groups),
        seen=seen.flatten(0, 1),
        values=values,
        frame_tokens=k.shape[1] * k.shape[2],
        scale=tau * k.shape[-1] ** -0.5,
    )
    look_bytes = len(values) * (q.shape[-1] + q.shape[2]) * q.element_size()
    cached = max(1, CPU_CACHE_BYTES // look_bytes) if device.type == "cpu" else chunk * groups
    flat = _ExpectedValues.apply(q.flatten(0, 1), k.flatten(0, 2), lookup, min(cached, chunk * groups))
    return flat.unflatten(0, (len(pairs), groups))


def expected_positions(q: Tensor, k: Tensor, pairs: Pairs, tau: float, chunk: int) -> Tensor:
    """Mean (row, column) over all of frame j: queries q [F, m, d] in keys k [F, H, W, d] -> [P, m, 2]."""
    values = token_positions(*k.shape[1:3], k)
    return expected_values(q[:, None], k, pairs, values, tau, chunk)[:, 0]


def dense_flow(q: Tensor, k: Tensor, pairs: Pairs, tau: float, chunk: int) -> Tensor:
    """The equation above on reduced features q, k [F, H, W, d] -> [P, H, W, 2]."""
    grid = tuple(q.shape[1:3])
    flow = expected_positions(q.flatten(1, 2), k, pairs, tau, chunk) - token_positions(*grid, q)
    return flow.unflatten(1, grid)


def attention_motion_flow(
    q: Tensor,
    k: Tensor,
    *,
    sf: int = 4,
    pairs: Pairs | None = None,
    tau: float = 1.0,
    heads: Heads = "mean_qk",
    chunk: int = 4,
    hard: bool = False,
) -> Tensor:
    """Dense flow of features q, k [F, H, W, d] or [F, H, W, n, d] -> [P, H, W, 2], (drow, dcol) in tokens.

    sf: pairs i <= j < i + sf, in order of i, then j; or `pairs`, a list of (i, j), in its order.
    tau: factor on the logits. heads: see `reduce_heads`. chunk: pairs held in memory at a time.
    hard: the displacement to the likeliest token instead of the mean one, without gradient (DiTFlow's
    reference). Raises ValueError on arguments that do not fit.
    """
    q, k = reduce_heads(q, k, heads)
    check_value("tau", TAU, tau)
    pairs = frame_pairs(len(q), sf) if pairs is None else pairs
    if any(not 0 <= frame < len(q) for pair in pairs for frame in pair):
        raise ValueError(f"pairs must name frames 0..{len(q) - 1}; got {pairs}")
    return _hard_flow(q, k, pairs) if hard else dense_flow(q, k, pairs, tau, chunk)


@torch.no_grad()
def _hard_flow(q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    rows, cols = q.shape[1:3]
    own = token_positions(rows, cols, q)
    best = [(q[i].flatten(0, 1) @ k[j].flatten(0, 1).T).argmax(-1) for i, j in pairs]
    return (own[torch.stack(best)] - own).unflatten(1, (rows, cols))
