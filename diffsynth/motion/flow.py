"""Attention motion flow (AMF): where, on average, a token of one frame looks in another.

    A_ij = softmax(tau * Q_i K_j^T / sqrt(d)),    flow_ij[s] = sum_s' A_ij[s, s'] * pos(s') - pos(s)

(paper section 3). Axes: F latent frames, H/W token rows/columns, S = H*W, P frame pairs, T groups of
queries, m queries of a group, L keys that a group sees. Positions are (row, column) in tokens. Everything
goes through `expected_values`, which holds the attention of `chunk` pairs at a time, forward and backward.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.motion.heads import Heads, reduce_heads

Pairs = Sequence[tuple[int, int]]


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


def _attend(q: Tensor, k: Tensor, seen: Tensor | None, values: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) values: q [B, T, m, d], k [B, S, d], seen [B, T, L] or None -> [B, T, m, 2].

    The logits of keys that are not seen are computed and dropped: one matrix product over the frame is
    faster, both ways, than gathering the L keys of every group (about twice at 30 x 52 tokens and L = 441,
    on a CPU).
    """
    logits = (q.flatten(1, 2) * scale @ k.mT).unflatten(1, q.shape[1:3])
    if seen is not None:
        logits = logits.gather(3, seen[:, :, None].expand(-1, -1, q.shape[2], -1))
    return logits.softmax(-1) @ values


def expected_values(
    q: Tensor, k: Tensor, pairs: Pairs, values: Tensor, tau: float, chunk: int, seen: Tensor | None = None
) -> Tensor:
    """Mean of `values` under attention, [P, T, m, 2], of groups of queries q [F, T, m, d], k [F, H, W, d].

    Of pair (i, j), the queries of frame i look at the keys of frame j: group t at those in seen [P, T, L],
    long, tokens of the frame, which may repeat; None: at all of them. values [L, 2]: of the keys seen, in
    order. chunk: pairs held in memory at a time; the backward pass computes their attention again. Raises
    ValueError if chunk is below 1.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk must be a whole number of frame pairs, at least 1; got {chunk!r}")
    if not pairs:
        return q.new_empty(0, *q.shape[1:3], 2)
    frames, scale = torch.tensor(pairs, device=q.device), tau * q.shape[-1] ** -0.5
    # Sums of many small shares: around their middle they lose fewer digits.
    middle = values.mean(0)
    out = []
    for start in range(0, len(pairs), chunk):
        at = slice(start, start + chunk)
        queries, keys = (
            x.index_select(0, frame) for x, frame in zip((q, k.flatten(1, 2)), frames[at].T, strict=True)
        )
        arguments = (queries, keys, None if seen is None else seen[at], values - middle, scale)
        out.append(
            checkpoint(_attend, *arguments, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else _attend(*arguments)
        )
    return torch.cat(out) + middle


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
    check_tau(tau)
    pairs = frame_pairs(len(q), sf) if pairs is None else pairs
    if any(not 0 <= frame < len(q) for pair in pairs for frame in pair):
        raise ValueError(f"pairs must name frames 0..{len(q) - 1}; got {pairs}")
    return _hard_flow(q, k, pairs) if hard else dense_flow(q, k, pairs, tau, chunk)


def check_tau(tau: float) -> None:
    """Raises ValueError unless tau is a finite number above 0."""
    if not 0 < tau < float("inf"):
        raise ValueError(f"tau must be a finite number above 0; got {tau!r}")


@torch.no_grad()
def _hard_flow(q: Tensor, k: Tensor, pairs: Pairs) -> Tensor:
    rows, cols = q.shape[1:3]
    own = token_positions(rows, cols, q)
    best = [(q[i].flatten(0, 1) @ k[j].flatten(0, 1).T).argmax(-1) for i, j in pairs]
    return (own[torch.stack(best)] - own).unflatten(1, (rows, cols))
