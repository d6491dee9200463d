"""Attention heads to one feature vector per token.

Axes: F latent frames, H/W token rows/columns, n heads, d head width. Flow code knows no heads: it takes
q . k / sqrt(width) of whatever features come out of here. Paper section 3 says "averaged over heads", which
has two readings, and the released code has a third.
"""

import torch
from torch import Tensor

from diffsynth.configs.fields import check_value
from diffsynth.configs.guidance import HEADS, Heads, check_heads


def precise(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 as it is: half precision is too little for sums over tokens."""
    return x if x.dtype == torch.float64 else x.float()


def reduce_heads(q: Tensor, k: Tensor, heads: Heads = "mean_qk") -> tuple[Tensor, Tensor]:
    """Reduce q, k [F, H, W, n, d] to features whose q . k / sqrt(width) are the logits of `heads`.

    "mean_qk": the mean of q and the mean of k over heads (width d).
    "mean_logits": the mean over heads of the logits q_c . k_c / sqrt(d) (width n * d, n times the work).
    Head indices: the mean of these heads' logits. "token_groups": what the released code captures.
    Features [F, H, W, d] count as reduced. The result is float32, or float64 from float64.

    Raises:
        ValueError: shapes or heads do not fit.
    """
    if q.shape != k.shape or q.ndim not in (4, 5):
        raise ValueError(
            f"q and k must both be [F, H, W, d] or [F, H, W, n, d]; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    heads = check_value("heads", HEADS, heads)
    q, k = precise(q), precise(k)
    if q.ndim == 4:
        return q, k
    frames, rows, cols, num_heads, _ = q.shape
    check_heads(heads, num_heads, (frames, rows, cols))
    if heads == "mean_qk":
        return q.mean(-2), k.mean(-2)
    if heads == "token_groups":
        return average_token_groups(q), average_token_groups(k)
    if not isinstance(heads, str):
        q, k = q[..., list(heads), :], k[..., list(heads), :]
    # On k alone, so that a difference of keys is the root mean square of the heads' differences.
    return q.flatten(-2), k.flatten(-2) * k.shape[3] ** -0.5


def average_token_groups(x: Tensor) -> Tensor:
    """Return the released capture, which is no head mean: x [F, H, W, n, d] -> [F, H, W, d].

    The mean of each n consecutive tokens, over frame and row ends, is taken at full width; token c of the
    group gets head c of that mean.
    """
    num_heads, width = x.shape[3:]
    return x.reshape(-1, num_heads, num_heads, width).mean(1).reshape(*x.shape[:3], width)
