"""The diffusion transformer (DiT) of Wan2.1 and Wan2.2, under the official state-dict keys.

Axes: B batch, C channels, F latent frames, h/w latent rows/columns, H/W token rows/columns, S = F*H*W tokens,
N heads, d head width, D = N*d model width. Tokens are ordered by frame, then row, then column.
Precision, as in the official code: the residual stream, modulation, norms, rotary embedding, time embedding
and head are float32 (float64 in a float64 model); linear layers and attention run in the dtype of the
weights.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from diffsynth.models.attention import AttentionBackend, choose_attention
from diffsynth.models.checkpointing import checkpointed
from diffsynth.models.local_attention import BlockPlan, TilePlan, Window, local_plan
from diffsynth.models.packed_linear import Model
from diffsynth.models.wan_video_dit_layers import (
    CrossAttention,
    FeedForward,
    ImageEmbedding,
    LayerNorm,
    SelfAttention,
    gated,
    linear_in,
    modulation_of,
    precise_dtype,
    rotary_table,
    sinusoidal_embedding,
)


@dataclass(frozen=True, slots=True)
class DiTState:
    """Inputs of the blocks, as `WanModel.embed` derives them from those of the model."""

    tokens: Tensor  # [B, S, D], float32, as are time and modulation
    time: Tensor  # [B, D], or [B, T, D] for T timesteps a sample
    modulation: Tensor  # [B, 6, D] or [B, T, 6, D]
    context: Tensor  # [B, L, D] in the weights' dtype
    image_context: Tensor | None  # [B, L_img, D]
    grid: tuple[int, int, int]  # (F, H, W)
    rope: Tensor  # [S, 1, d/2, 2]
    attention_window: Window | None = None  # how far self-attention looks; None for everywhere
    attention_plan: TilePlan | BlockPlan | None = None  # for this window, as compiled blocks cannot make it
    backend: AttentionBackend | None = None  # of attention; None: chosen at each call, if not compiled


class DiTBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; the timestep gates and modulates the first and last."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, eps: float, has_image_input: bool) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.norm1 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, num_heads, eps)
        self.norm3 = LayerNorm(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps, has_image_input)
        self.norm2 = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, ffn_dim)

    def queries_keys(self, tokens: Tensor, state: DiTState) -> tuple[Tensor, Tensor]:
        """Return the normed, rotated q and k [B, S, N, d] of this block's self-attention, and no more."""
        shift, scale, *_ = modulation_of(self.modulation, state.modulation)
        return self.self_attn.queries_keys(
            self.norm1(tokens, shift, scale, dtype=state.context.dtype), state.rope
        )

    def forward(self, tokens: Tensor, state: DiTState) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation_of(self.modulation, state.modulation)
        dtype = state.context.dtype
        # No name here holds the inputs of attention and feed-forward: their memory is free after each.
        where = (state.rope, state.grid, state.attention_window, state.attention_plan, state.backend)
        y = self.self_attn(self.norm1(tokens, shift1, scale1, dtype=dtype), *where)
        tokens = gated(tokens, y, gate1)
        tokens = tokens + self.cross_attn(
            self.norm3(tokens, dtype=dtype), state.context, state.image_context, state.backend
        )
        y = self.ffn(self.norm2(tokens, shift2, scale2, dtype=dtype))
        return gated(tokens, y, gate2)


class Head(nn.Module):
    """Tokens to velocity patches, in float32."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.norm = LayerNorm(dim, eps=eps, elementwise_affine=False)
        self.head = nn.Linear(dim, out_features)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Map tokens [B, S, D] with time [B, D] or [B, T, D] -> [B, S, out_features]."""
        shift, scale = modulation_of(self.modulation, time.unsqueeze(-2))
        return linear_in(tokens.dtype, self.head, self.norm(tokens, shift, scale))


class WanModel(Model):
    """The DiT. Arguments as in the official config, and those of the image branch of Wan2.1's image models.

    Args:
        has_image_input: attend to CLIP features, too.
        image_dim: width of the CLIP features.
        image_positions: number of learned positions that are added to them; 0 for none.
        has_clean_first_frame: the first latent frame may be a picture's, at timestep 0 (TI2V).
    """

    def __init__(
        self,
        *,
        dim: int,
        in_dim: int,
        ffn_dim: int,
        out_dim: int,
        text_dim: int,
        freq_dim: int,
        num_heads: int,
        num_layers: int,
        eps: float = 1e-6,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        has_image_input: bool = False,
        text_len: int = 512,
        image_dim: int = 1280,
        image_positions: int = 0,
        has_clean_first_frame: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or freq_dim % 2:
            raise ValueError(f"num_heads must be at least 1 and freq_dim even; got {num_heads}, {freq_dim}")
        if dim % num_heads or (dim // num_heads) % 2:
            raise ValueError(f"dim must be num_heads ({num_heads}) times an even head width; got {dim}")
        self.dim, self.in_dim, self.out_dim = dim, in_dim, out_dim
        self.ffn_dim, self.text_dim, self.freq_dim, self.text_len = ffn_dim, text_dim, freq_dim, text_len
        self.num_heads, self.num_layers, self.eps = num_heads, num_layers, eps
        frames, rows, cols = patch_size
        self.patch_size = (frames, rows, cols)
        self.has_image_input, self.image_positions = has_image_input, image_positions
        self.has_clean_first_frame = has_clean_first_frame
        self.patch_embedding = nn.Conv3d(in_dim, dim, kernel_size=self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(
            DiTBlock(dim, ffn_dim, num_heads, eps, has_image_input) for _ in range(num_layers)
        )
        self.head = Head(dim, out_dim * prod(self.patch_size), eps)
        if has_image_input:
            self.img_emb = ImageEmbedding(image_dim, dim, image_positions)

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_feature: Tensor | None = None,
        y: Tensor | None = None,
    ) -> DiTState:
        """Return what the blocks read, given the inputs of `forward`; ValueError if a size does not fit."""
        if self.has_image_input != (clip_feature is not None):
            need = "needs" if self.has_image_input else "does not take"
            raise ValueError(f"this DiT {need} clip_feature (has_image_input={self.has_image_input})")
        if y is not None:
            x = torch.cat([x, y.to(x.dtype)], dim=1)
        fits = x.ndim == 5 and all(n % p == 0 for n, p in zip(x.shape[2:], self.patch_size, strict=True))
        if not fits or x.shape[1] != self.in_dim:
            raise ValueError(
                f"x must be [B, {self.in_dim}, F, h, w] with F, h, w divisible by {self.patch_size}; "
                f"got {tuple(x.shape)}"
            )
        frames, rows, cols = (n // p for n, p in zip(x.shape[2:], self.patch_size, strict=True))
        grid = (frames, rows, cols)
        counts = (frames, prod(grid))  # of timesteps a sample, where it has several
        if timestep.ndim not in (1, 2) or len(timestep) not in (1, len(x)) or (
            timestep.ndim == 2 and timestep.shape[1] not in counts
        ):  # fmt: skip
            raise ValueError(
                f"timestep must be [B] or [B, {counts[0]} or {counts[1]}]; got {tuple(timestep.shape)}"
            )
        if context.ndim != 3 or context.shape[1] > self.text_len or context.shape[2] != self.text_dim:
            raise ValueError(
                f"context must be [B, at most {self.text_len}, {self.text_dim}]; got {tuple(context.shape)}"
            )
        stream = precise_dtype(self.dtype)
        tokens = self.patch_embedding(x.to(self.dtype))
        # Without non_blocking, a copy from the CPU would wait until the device has done all its work.
        waves = sinusoidal_embedding(timestep, self.freq_dim).to(stream).to(self.device, non_blocking=True)
        hidden = linear_in(stream, self.time_embedding[0], waves)
        time = linear_in(stream, self.time_embedding[2], F.silu(hidden))
        modulation = linear_in(stream, self.time_projection[1], F.silu(time))
        # Rows past the prompt are zero before the text MLP and attended to: the official model has no mask.
        padded = F.pad(context.to(self.dtype), (0, 0, 0, self.text_len - context.shape[1]))
        context, head_dim = self.text_embedding(padded), self.dim // self.num_heads
        sources = (tokens, modulation, context, next(self.blocks.parameters()))
        needs_grad = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        return DiTState(
            # Token after token in memory: all blocks keep this layout, and norms would copy another one.
            tokens=tokens.flatten(2).transpose(1, 2).contiguous().to(stream),
            time=time,
            modulation=modulation.unflatten(-1, (6, self.dim)),
            context=context,
            image_context=None if clip_feature is None else self.img_emb(clip_feature.to(self.dtype)),
            grid=grid,
            rope=rotary_table(grid, head_dim, x.device, stream),
            backend=choose_attention(x.device.type, self.dtype, head_dim, needs_grad),
        )

    def run_blocks(
        self, state: DiTState, stop: int | None = None, checkpoint: str = "none", *, start: int = 0
    ) -> Tensor:
        """Run the blocks from `start` to before `stop` (all by default) on state.tokens -> tokens [B, S, D].

        checkpoint is what is kept for the backward pass: all ("none"), or as in `checkpointing`.
        """
        tokens, kept = state.tokens, checkpoint != "none"
        if kept:
            # Blocks do not read these, but each of them would keep them.
            state = replace(state, tokens=tokens.new_empty(0))
        for block in self.blocks[start:stop]:
            tokens = checkpointed(block, tokens, state, keep=checkpoint) if kept else block(tokens, state)
        return tokens

    def unembed(self, tokens: Tensor, state: DiTState) -> Tensor:
        """Map tokens [B, S, D] to the velocity [B, out_dim, F, h, w], float32."""
        return self.unpatchify(self.head(tokens, state.time), state.grid)

    def unpatchify(self, patches: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Join the patches [B, S, patch * out_dim] of a grid (F, H, W): [B, out_dim, F, h, w]."""
        sides = dict(zip(("f", "h", "w", "pf", "ph", "pw"), (*grid, *self.patch_size), strict=True))
        return rearrange(patches, "b (f h w) (pf ph pw c) -> b c (f pf) (h ph) (w pw)", **sides)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_feature: Tensor | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """Return the velocity (noise - clean latents) at a timestep.

        Args:
            x: noised latents [B, in_dim, F, h, w].
            timestep: on the scale of 0 to 1000; [B], or one a latent frame [B, F] or a token [B, S].
            context: text embedding [B, L, text_dim], padded here with zero rows to text_len.
            clip_feature: [B, L, image_dim] if has_image_input; of two images, one after the other.
            y: [B, in_dim - out_dim, F, h, w], channels appended to x, for image models.

        Returns:
            [B, out_dim, F, h, w], float32.

        Raises:
            ValueError: sizes do not fit.
        """
        state = self.embed(x, timestep, context, clip_feature, y)
        return self.unembed(self.run_blocks(state), state)

    def features(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        block: int = 14,
        *,
        clip_feature: Tensor | None = None,
        y: Tensor | None = None,
        checkpoint: str = "none",
        attention_window: Window | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return normed, rotated q and k of one block's self-attention, each [B, F, H, W, N, d].

        Only the blocks before `block` and its q and k are computed.

        Args:
            x, timestep, context, clip_feature, y: as in `forward`.
            block: index of the block whose q and k are returned.
            checkpoint: as in `run_blocks`.
            attention_window: (frames, rows, columns) in tokens that self-attention sees to each side; None:
                all.

        Raises:
            ValueError: the model has no such block.
        """
        if not 0 <= block < self.num_layers:
            raise ValueError(f"block must be in 0..{self.num_layers - 1} for this DiT; got {block}")
        state = self.embed(x, timestep, context, clip_feature, y)
        if attention_window is not None:
            plan = local_plan(state.grid, attention_window, state.context, self.dim // self.num_heads)
            state = replace(state, attention_window=attention_window, attention_plan=plan)
        tokens = self.run_blocks(state, block, checkpoint)
        q, k = cast(DiTBlock, self.blocks[block]).queries_keys(tokens, state)
        return q.unflatten(1, state.grid), k.unflatten(1, state.grid)
