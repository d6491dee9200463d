"""Blocks of the video VAEs, and their encoder and decoder, which run over a video chunk by chunk.

Axes: B batch, C channels, t frames of one chunk, h/w rows/columns at the block's resolution. Every block maps
[B, C, t, h, w] to the same kind of tensor.
A `Cache` carries what a causal layer needs of earlier chunks. It is made by the caller, one for each video,
and is filled as chunks pass; a layer that is not in it yet sees the first chunk, which must be one frame.
Wan2.2's VAE is made of the same blocks: "residual" here means its wiring, in which cells of PATCH x PATCH
pixels are folded into channels and each level has a shortcut without weights.
Precision: the dtype of the weights, but for the norms, which compute in float32 at least.
"""

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

IMAGE_CHANNELS = 3
PATCH = 2  # rows and columns of pixels that Wan2.2's VAE folds into channels
NUM_PAST = 2  # earlier frames that a causal convolution sees
Cache = dict[nn.Module, Tensor]


class ChannelNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channel axis, with |x| not below 1e-12."""

    def __init__(self, channels: int, position_axes: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * position_axes))

    def forward(self, x: Tensor) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        # Not `vector_norm`, which is several times slower across a stride on a CPU.
        squares = x.square() if x.dtype == precise else x.to(precise).square_()
        norm = squares.sum(dim=1, keepdim=True).clamp_min(1e-24).sqrt()
        scaled = x * (math.sqrt(x.shape[1]) / norm)
        # In place, to save a copy of the chunk; rounded once, after all products.
        return scaled.mul_(self.gamma).to(x.dtype)


class CausalConv3d(nn.Conv3d):
    """Convolution that sees, in time, a frame and the two before it; zeros stand before the first frame.

    Use as `conv(conv.with_past(x, cache))`. In two steps, the chunk without its past can be freed between.
    """

    def __init__(self, in_channels: int, out_channels: int, spatial_kernel: int = 3) -> None:
        kernel = (NUM_PAST + 1, spatial_kernel, spatial_kernel)
        padding = (0, spatial_kernel // 2, spatial_kernel // 2)
        super().__init__(in_channels, out_channels, kernel, padding=padding)

    def forget(self, x: Tensor, cache: Cache) -> None:
        """Make the next chunk, of the size of x, the first that is seen."""
        cache[self] = x.new_zeros(*x.shape[:2], NUM_PAST, *x.shape[3:])

    def with_past(self, x: Tensor, cache: Cache) -> Tensor:
        """Return the chunk behind the two frames before it, [B, C, 2 + t, h, w]; keep its own last two."""
        if self not in cache:
            self.forget(x, cache)
        x = torch.cat([cache[self], x], dim=2)
        # A copy, since a view would keep the whole chunk alive.
        cache[self] = x[:, :, -NUM_PAST:].clone()
        return x


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution; plus the input, by a 1x1x1 convolution if widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels),
                "3": ChannelNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        norm1, conv1, norm2, conv2 = cast(Iterable[CausalConv3d], self.residual.values())
        # Statement by statement, so that no more than two tensors are alive beside x.
        hidden = F.silu(norm1(x), inplace=True)
        hidden = conv1.with_past(hidden, cache)
        hidden = conv1(hidden)
        hidden = F.silu(norm2(hidden), inplace=True)
        hidden = conv2.with_past(hidden, cache)
        hidden = conv2(hidden)
        return hidden + self.shortcut(x)


class FrameAttention(nn.Module):
    """Self-attention of one head over the h*w positions of each frame on its own, plus the input; no past."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, position_axes=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, _cache: Cache) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        qkv = self.to_qkv(self.norm(frames))
        # The memory-efficient kernels want the channels next to each other.
        q, k, v = rearrange(qkv, "f (three c) h w -> three f 1 (h w) c", three=3).contiguous()
        attended = F.scaled_dot_product_attention(q, k, v)
        attended = self.proj(rearrange(attended, "f 1 (h w) c -> f c h w", h=x.shape[3]))
        return x + rearrange(attended, "(b t) c h w -> b c t h w", b=x.shape[0])


class Downsample(nn.Module):
    """Half the rows and columns; if temporal, also half the frames, but for the first, which stays alone."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        frames = F.pad(rearrange(x, "b c t h w -> (b t) c h w"), (0, 1, 0, 1))
        x = rearrange(self.resample["1"](frames), "(b t) c h w -> b c t h w", b=x.shape[0])
        if self.time_conv is None:
            return x
        last_before = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        return x if last_before is None else self.time_conv(torch.cat([last_before, x], dim=2))


class Upsample(nn.Module):
    """Twice the rows and columns; if temporal, also twice the frames, but for the first.

    The first frame passes by the temporal convolution, and no later frame sees it there.
    """

    def __init__(self, channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, out_channels, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, 2 * channels, spatial_kernel=1) if temporal else None

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        if self.time_conv is not None:
            if self.time_conv in cache:
                pairs = self.time_conv(self.time_conv.with_past(x, cache))
                x = rearrange(pairs, "b (pair c) t h w -> b c (t pair) h w", pair=2)
            else:
                self.time_conv.forget(x, cache)
        frames = F.interpolate(rearrange(x, "b c t h w -> (b t) c h w"), scale_factor=2, mode="nearest")
        return rearrange(self.resample["1"](frames), "(b t) c h w -> b c t h w", b=x.shape[0])


def average_down(x: Tensor, channels: int, time: int, space: int) -> Tensor:
    """Shrink x [B, C, t, h, w] by whole factors: the mean over groups of the values of each cell.

    The values of a cell stand in the order (channel, frame, row, column) and are averaged in `channels` equal
    groups. Zeros stand before the first frame where the frames do not fill the cells.
    """
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % time, 0))
    cells = rearrange(x, "b c (t dt) (h dy) (w dx) -> b (c dt dy dx) t h w", dt=time, dy=space, dx=space)
    return cells.unflatten(1, (channels, -1)).mean(dim=2)


def duplicate_up(x: Tensor, channels: int, time: int, space: int, first: bool) -> Tensor:
    """Grow x [B, C, t, h, w] by whole factors: repeated channels become the values of a cell.

    With `first`, it is the first chunk, whose frame stays one.
    """
    x = x.repeat_interleave(channels * time * space**2 // x.shape[1], dim=1)
    x = rearrange(
        x, "b (c dt dy dx) t h w -> b c (t dt) (h dy) (w dx)", c=channels, dt=time, dy=space, dx=space
    )
    return x[:, :, time - 1 :] if first else x


class DownLevel(nn.Module):
    """One level of Wan2.2's encoder: residual blocks and a resampling, plus the input, shrunk."""

    def __init__(self, blocks: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.downsamples = nn.ModuleList(blocks)
        last = blocks[-1]
        self.space = 2 if isinstance(last, Downsample) else 1
        self.time = 2 if isinstance(last, Downsample) and last.time_conv is not None else 1

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        shortcut = average_down(x, self.channels, self.time, self.space)
        for block in self.downsamples:
            x = block(x, cache)
        return x + shortcut


class UpLevel(nn.Module):
    """One level of Wan2.2's decoder: residual blocks, then a resampling plus the input, grown; or neither."""

    def __init__(self, blocks: Sequence[nn.Module], channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.upsamples = nn.ModuleList(blocks)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        before, last = x, self.upsamples[-1]
        first = isinstance(last, Upsample) and last.time_conv not in cache
        for block in self.upsamples:
            x = block(x, cache)
        if not isinstance(last, Upsample):
            return x
        return x + duplicate_up(before, self.channels, 1 if last.time_conv is None else 2, 2, first)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
    )


def _head(in_channels: int, out_channels: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(in_channels), "2": CausalConv3d(in_channels, out_channels)})


def _run_head(head: nn.ModuleDict, x: Tensor, cache: Cache) -> Tensor:
    norm, conv = cast(Iterable[CausalConv3d], head.values())
    return conv(conv.with_past(F.silu(norm(x), inplace=True), cache))


class Encoder(nn.Module):
    """A chunk of pixels [B, 3, t, H, W] -> [B, 2z, 1, h, w], mean and log-variance before the last mixing.

    widths: channels of each level, from full resolution on; temporal: for each step between two, whether it
    halves the frames, too; residual: the wiring of Wan2.2.
    """

    def __init__(
        self,
        dim: int,
        z_dim: int,
        widths: Sequence[int],
        num_res_blocks: int,
        temporal: Sequence[bool],
        residual: bool,
    ) -> None:
        super().__init__()
        self.patch = PATCH if residual else 1
        self.conv1 = CausalConv3d(IMAGE_CHANNELS * self.patch**2, dim)
        self.downsamples = nn.ModuleList()
        width = dim
        for level, out_width in enumerate(widths):
            inputs = [width] + [out_width] * (num_res_blocks - 1)
            width = out_width
            blocks: list[nn.Module] = [ResidualBlock(channels, width) for channels in inputs]
            if level < len(temporal):
                blocks.append(Downsample(width, temporal[level]))
            self.downsamples.extend([DownLevel(blocks, width)] if residual else blocks)
        self.middle = _middle(width)
        self.head = _head(width, 2 * z_dim)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = rearrange(x, "b c t (h dy) (w dx) -> b (c dx dy) t h w", dy=self.patch, dx=self.patch)
        x = self.conv1(self.conv1.with_past(x, cache))
        for block in (*self.downsamples, *self.middle):
            x = block(x, cache)
        return _run_head(self.head, x, cache)


class Decoder(nn.Module):
    """One latent frame [B, z, 1, h, w] -> a chunk of pixels [B, 3, t, H, W], not clamped.

    widths and temporal: as for `Encoder`, both in reverse order; num_res_blocks: of the encoder, here one
    more; residual: the wiring of Wan2.2.
    """

    def __init__(
        self, z_dim: int, widths: Sequence[int], num_res_blocks: int, temporal: Sequence[bool], residual: bool
    ) -> None:
        super().__init__()
        self.patch = PATCH if residual else 1
        width = widths[0]
        self.conv1 = CausalConv3d(z_dim, width)
        self.middle = _middle(width)
        self.upsamples = nn.ModuleList()
        for level, out_width in enumerate(widths):
            inputs = [width] + [out_width] * num_res_blocks
            width = out_width
            blocks: list[nn.Module] = [ResidualBlock(channels, width) for channels in inputs]
            if level < len(temporal):
                width = width if residual else width // 2
                blocks.append(Upsample(out_width, width, temporal[level]))
            self.upsamples.extend([UpLevel(blocks, width)] if residual else blocks)
        self.head = _head(width, IMAGE_CHANNELS * self.patch**2)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        x = self.conv1(self.conv1.with_past(x, cache))
        for block in (*self.middle, *self.upsamples):
            x = block(x, cache)
        x = _run_head(self.head, x, cache)
        return rearrange(x, "b (c dx dy) t h w -> b c t (h dy) (w dx)", dy=self.patch, dx=self.patch)
