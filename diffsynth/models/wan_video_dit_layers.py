"""Layers of the Wan2.1 DiT: rotary positions, norms, attentions, feed-forward.

Axes and precision: see `wan_video_dit`.
"""

from functools import lru_cache
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.attention import AttentionBackend, attention
from diffsynth.models.compiled import fused
from diffsynth.models.local_attention import BlockPlan, Grid, TilePlan, Window, local_attention

SLICE_TOKENS = 4096  # of a feed-forward without gradients; enough to keep a GPU busy


def precise_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for what must not be computed in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sinusoidal_embedding(timestep: Tensor, dim: int) -> Tensor:
    """Embed timestep [...], on the scale of 0 to 1000, as [..., dim] float64, cosines first.

    It is computed where the timestep is or, where there is no float64, on the CPU.
    """
    timestep = timestep.cpu() if timestep.device.type == "mps" else timestep
    exponent = torch.arange(dim // 2, dtype=torch.float64, device=timestep.device) / (dim // 2)
    angles = timestep.double()[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a kept table must also serve calls with gradients
def rotary_table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines that turn the pairs of a head: grid (F, H, W) -> [S, 1, head_dim / 2, 2].

    Of the pairs, the last d // 6 belong to the column, as many before to the row, the others to the
    frame. It is computed on the CPU, in float64, which not every device has.
    """
    spatial = head_dim // 6
    positions = torch.cartesian_prod(*(torch.arange(side).double() for side in grid))
    angles = []
    for position, columns in zip(positions.T, (head_dim // 2 - 2 * spatial, spatial, spatial), strict=True):
        exponent = torch.arange(columns, dtype=torch.float64) / max(columns, 1)
        angles.append(torch.outer(position, 10000.0**-exponent))
    turned = torch.cat(angles, dim=-1)[:, None]
    return torch.stack([turned.cos(), turned.sin()], dim=-1).to(dtype).to(device)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply a rotary table [S, 1, d/2, 2] to x [B, S, N, d]; pairs (2i, 2i+1) are complex numbers."""
    pairs = x.to(rope.dtype).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses real numbers, and not complex ones
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the full width; the mean square in float32, the product in x's dtype."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    @fused
    def forward(self, x: Tensor, num_heads: int = 1, rope: Tensor | None = None) -> Tensor:
        """Norm x [..., D]; with `rope`, [B, S, D] is then split into heads and rotated: [B, S, N, d]."""
        x = F.rms_norm(x.to(precise_dtype(x.dtype)), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight
        return x if rope is None else rotate(x.unflatten(-1, (num_heads, -1)), rope)


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in the dtype of its input, whatever the weights are stored in."""

    @fused
    def forward(self, x: Tensor, *shift_scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Norm x [..., D], `modulate` it if shift and scale are given, and cast it to `dtype`."""
        weight, bias = (None if own is None else own.to(x.dtype) for own in (self.weight, self.bias))
        normed = F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)
        return (modulate(normed, *shift_scale) if shift_scale else normed).to(dtype or x.dtype)


def modulation_of(own: Tensor, time: Tensor) -> list[Tensor]:
    """Add a layer's modulation [1, n, D] to the timestep's [B, n, D] or [B, T, n, D] -> n of [B, T, 1, D]."""
    return [part.reshape(len(part), -1, 1, part.shape[-1]) for part in (own.to(time.dtype) + time).unbind(-2)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift for tokens [B, S, D]; both are [B, T, 1, D], each for S / T in a row."""
    return torch.addcmul(shift, x.unflatten(1, (shift.shape[1], -1)), 1 + scale).flatten(1, 2)


@fused
def gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Return x + y * gate for tokens [B, S, D] and a gate [B, T, 1, D], as in `modulate`."""
    parts = (gate.shape[1], -1)
    return torch.addcmul(x.unflatten(1, parts), y.to(x.dtype).unflatten(1, parts), gate).flatten(1, 2)


def linear_in(dtype: torch.dtype, layer: nn.Module, x: Tensor) -> Tensor:
    """Run a linear layer in `dtype`, whatever its weights are stored in."""
    layer = cast(nn.Linear, layer)  # a Sequential tells modules only
    return F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))


class Projections(nn.Module):
    """The linear layers and norms of an attention."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        """Split x [B, S, D] into heads [B, S, N, d]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Projections):
    """Attention over the tokens of the video, all or those near by, with rotary positions."""

    def queries_keys(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return normed and rotated q and k, each [B, S, N, d], of x [B, S, D]."""
        return self.norm_q(self.q(x), self.num_heads, rope), self.norm_k(self.k(x), self.num_heads, rope)

    def forward(
        self, x: Tensor, rope: Tensor, grid: Grid, window: Window | None = None,
        plan: TilePlan | BlockPlan | None = None, backend: AttentionBackend | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend within x [B, S, D] of a grid (F, H, W), to all tokens or a window (`local_attention`)."""
        q, k = self.queries_keys(x, rope)
        v = self.heads(self.v(x))
        if window is None:
            seen = attention(q, k, v, backend=backend)
        else:
            seen = local_attention(q, k, v, grid=grid, window=window, plan=plan, backend=backend)
        return self.o(seen.flatten(2))


class CrossAttention(Projections):
    """Attention from video tokens to the text and, in image models, to image tokens as well."""

    def __init__(self, dim: int, num_heads: int, eps: float, has_image_input: bool) -> None:
        super().__init__(dim, num_heads, eps)
        if has_image_input:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(
        self, x: Tensor, context: Tensor, image_context: Tensor | None,
        backend: AttentionBackend | None = None,
    ) -> Tensor:  # fmt: skip
        q, k = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(context)))
        out = attention(q, k, self.heads(self.v(context)), backend=backend)
        if image_context is not None:
            k_img = self.heads(self.norm_k_img(self.k_img(image_context)))
            out = out + attention(q, k_img, self.heads(self.v_img(image_context)), backend=backend)
        return self.o(out.flatten(2))


class FeedForward(nn.Sequential):
    """Linear, GELU, linear; slice by slice where no gradient is needed, as its hidden layer is the widest."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(approximate="tanh"), nn.Linear(hidden_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, S, D] -> [B, S, D]."""
        if torch.is_grad_enabled():
            return super().forward(x)
        run = super().forward
        return torch.cat([run(part) for part in x.split(SLICE_TOKENS, dim=1)], dim=1)


class ImageEmbedding(nn.Module):
    """CLIP features [B, L, image_dim], plus learned positions unless there are 0 -> context [B, L, D]."""

    def __init__(self, image_dim: int, dim: int, positions: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            LayerNorm(dim),
        )
        if positions:
            self.emb_pos = nn.Parameter(torch.zeros(1, positions, image_dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x + self.emb_pos if hasattr(self, "emb_pos") else x)
