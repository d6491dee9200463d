"""Attention motion flow (AMF): where, on average, a token of one frame looks in another.

    A_ij = softmax(tau * Q_i K_j^T / sqrt(d)),    flow_ij[s] = sum_s' A_ij[s, s'] * pos(s') - pos(s)

(paper section 3). It is attention whose values are positions. Axes: F latent frames, H/W token rows/columns,
S = H*W, P frame pairs, T groups of queries, m queries of a group, L keys that a group sees. Positions are
(row, column) in tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, product

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth.configs.fields import Whole, check_value
from diffsynth.configs.guidance import TAU, Heads
from diffsynth.models.tables import table
from diffsynth.motion.heads import reduce_heads

Pairs = Sequence[tuple[int, int]]

# Values are padded with zeros to a width that a fused kernel takes: on CUDA its least, on a CPU the width of
# queries and keys. With two columns PyTorch would silently take the kernel that holds all S x S weights.
CUDA_VALUE_WIDTH = 8
# Bytes of keys gathered at a time for groups that see windows. Smaller pieces stay in a CPU's cache, but
# their many small operations wait for each other's threads where cores are busy.
GATHERED_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionFlow:
    """Attention motion flow of a video.

    Attributes:
        flow: [P, H, W, 2], (drow, dcol) in tokens.
        pairs: its P pairs of frames, i <= j < i + sf by i, then j.
        window_loss: scalar, how much the mean key of a tile's window changes from frame to frame; None
            without windows.
    """

    flow: Tensor
    pairs: Pairs
    window_loss: Tensor | None = None


def frame_pairs(num_frames: int, sf: int) -> list[tuple[int, int]]:
    """Return the frame pairs i <= j < i + sf that exist, in order of i, then j.

    Raises:
        ValueError: num_frames or sf is below 1.
    """
    for name, given in (("num_frames", num_frames), ("sf", sf)):
        if not isinstance(given, int) or given < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {given!r}")
    return [(i, j) for i in range(num_frames) for j in range(i, min(num_frames, i + sf))]


def token_positions(rows: int, cols: int, like: Tensor) -> Tensor:
    """Return (row, column) of each token, [rows * cols, 2], in dtype and on device of `like`, read only."""
    return table(tuple(product(range(rows), range(cols))), like.device, like.dtype)


def attend(q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return the mean of `values` under attention: q [B, m, d], k [B, L, d], values [L, 2] -> [B, m, 2]."""
    # Sums of many small shares: around their middle they lose fewer digits.
    middle = values.mean(0)
    width = CUDA_VALUE_WIDTH if q.is_cuda else max(2, q.shape[-1])
    padded = F.pad(values - middle, (0, width - 2)).expand(len(k), 1, -1, -1)
    return F.scaled_dot_product_attention(q[:, None], k[:, None], padded, scale=scale)[:, 0, :, :2] + middle


def expected_positions(q: Tensor, k: Tensor, pairs: Pairs, tau: float, chunk: int) -> Tensor:
    """Return the mean (row, column) over all of frame j: q [F, m, d], k [F, H, W, d] -> [P, m, 2].

    Args:
        q, k, pairs, tau: as in `dense_flow`, q flattened.
        chunk: pairs at a time, at most.
    """
    check_value("chunk", Whole(1), chunk)
    positions, scale = token_positions(k.shape[1], k.shape[2], k), tau * k.shape[-1] ** -0.5
    keys = k.flatten(1, 2)
    found = [
        attend(q[i].expand(count, -1, -1), keys[j : j + count], positions, scale)
        for i, j, count in _runs(pairs, chunk)
    ]
    return torch.cat(found) if found else q.new_zeros(0, q.shape[1], 2)


def expected_in_windows(
    q: Tensor, k: Tensor, pairs: Pairs, values: Tensor, seen: Tensor, tau: float
) -> Tensor:
    """Return the mean of `values` over what groups see: q [F, T, m, d], k [F, H, W, d] -> [P, T, m, 2].

    Args:
        q, k: reduced features.
        pairs, tau: the pairs (i, j), and the factor on the logits.
        values: [L, 2], of the keys seen, in order.
        seen: [P, T, L] long: for pair (i, j), the tokens of frame j that each group of frame i sees; they may
            repeat.
    """
    groups = max(1, GATHERED_BYTES // (len(values) * q.shape[-1] * q.element_size()))
    middle = values.mean(0)
    queries, keys = (q * (tau * q.shape[-1] ** -0.5)).unbind(0), k.flatten(1, 2).unbind(0)
    found = [
        # The gathered keys, a copy for every group, are gathered again for the backward pass and not kept.
        checkpoint(_logits, some, keys[j], tokens, use_reentrant=False, preserve_rng_state=False).softmax(-1)
        @ (values - middle)
        for (i, j), windows in zip(pairs, seen, strict=True)
        for some, tokens in zip(queries[i].split(groups), windows.split(groups), strict=True)
    ]
    shape = (len(pairs), *q.shape[1:3], 2)
    return torch.cat(found).reshape(shape) + middle if found else q.new_zeros(shape)


def _logits(q: Tensor, keys: Tensor, tokens: Tensor) -> Tensor:
    """q . k of the keys that each group sees: q [T, m, d], keys [S, d], tokens [T, L] -> [T, m, L]."""
    # An embedding, because its backward pass adds up on all cores, and keys first, because they are more.
    return torch.bmm(F.embedding(tokens, keys), q.mT).mT


def dense_flow(q: Tensor, k: Tensor, pairs: Pairs, tau: float, chunk: int) -> Tensor:
    """Return the flow of the equation above on reduced features q, k [F, H, W, d] -> [P, H, W, 2]."""
    rows, cols = q.shape[1:3]
    flow = expected_positions(q.flatten(1, 2), k, pairs, tau, chunk) - token_positions(rows, cols, q)
    return flow.unflatten(1, (rows, cols))


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
    """Return the dense flow [P, H, W, 2], (drow, dcol) in tokens, of features [F, H, W(, n), d].

    Args:
        q, k: queries and keys of one block.
        sf: span of the pairs i <= j < i + sf, in order of i, then j.
        pairs: a list of (i, j) instead, in its order.
        tau: factor on the logits.
        heads: see `reduce_heads`.
        chunk: pairs held in memory at a time.
        hard: return the displacement to the likeliest token instead of the mean one, without gradient
            (DiTFlow's reference).

    Raises:
        ValueError: arguments do not fit.
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


def _runs(pairs: Pairs, chunk: int) -> Iterator[tuple[int, int, int]]:
    """Yield (i, first j, count) of consecutive pairs of frame i with frames j, j + 1, ..., at most chunk."""
    for (i, _), run in groupby(enumerate(pairs), lambda item: (item[1][0], item[1][1] - item[0])):
        later = [j for _, (_, j) in run]
        for start in range(0, len(later), chunk):
            yield i, later[start], min(chunk, len(later) - start)
