"""The causal 3D VAEs of Wan, under the official state-dict keys: videos to latents and back.

Axes: B batch, T pixel frames, H/W pixel rows/columns, z latent channels, F latent frames, h/w latent
rows/columns. The first frame is a latent frame alone; then `temporal_factor` frames make one. Both ways
run chunk by chunk, one latent frame each, with a cache of what causal layers need of the past: exact, and
with a peak of memory that does not grow with the length of the video.
Precision: the dtype of the weights; latents, their normalisation, results and blending are float32.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from diffsynth.configs.checkpoints import LATENT_STATISTICS
from diffsynth.models.packed_linear import Model
from diffsynth.models.tables import table
from diffsynth.models.wan_video_vae_layers import IMAGE_CHANNELS, PATCH, Cache, Decoder, Encoder
from diffsynth.models.wan_video_vae_tiling import Tile, TileGrid, blend


class WanVideoVAE(Model):
    """Video VAE: [B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, z, F, H / 8, W / 8].

    Args:
        dim: channels at full resolution.
        z_dim: latent channels.
        dim_mult: multiples of dim, level by level; each further level halves rows and columns.
        num_res_blocks: residual blocks in a level of the encoder.
        temperal_downsample: for each step between levels, whether it halves the frames, too (the spelling of
            the published configs).
        latents_mean: with latents_std, the statistics that normalise the latents; by default the published
            ones for 16 and 48 channels, else 0 and 1.
        dec_dim: channels of the decoder at full resolution, in a VAE of the wiring of Wan2.2 (see
            `WanVideoVAE22`); None for that of Wan2.1, whose halves both have dim.

    Raises:
        ValueError: arguments do not fit together.
    """

    blend = staticmethod(blend)

    def __init__(
        self,
        dim: int = 96,
        z_dim: int = 16,
        dim_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temperal_downsample: Sequence[bool] = (False, True, True),
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        dec_dim: int | None = None,
    ) -> None:
        super().__init__()
        if min(dim, z_dim, num_res_blocks, *dim_mult) < 1:
            raise ValueError(
                "dim, z_dim, num_res_blocks and dim_mult must be at least 1; "
                f"got {dim}, {z_dim}, {num_res_blocks}, {tuple(dim_mult)}"
            )
        if len(temperal_downsample) != len(dim_mult) - 1:
            raise ValueError(
                "temperal_downsample must have one entry less than dim_mult; "
                f"got {tuple(temperal_downsample)} and {tuple(dim_mult)}"
            )
        self.z_dim, self.num_res_blocks = z_dim, num_res_blocks
        self.temporal = tuple(map(bool, temperal_downsample))  # for each step, whether it halves the frames
        residual = dec_dim is not None
        self.spatial_factor = 2 ** len(temperal_downsample) * (PATCH if residual else 1)
        self.temporal_factor = 2 ** sum(self.temporal)
        mean, std = LATENT_STATISTICS.get(z_dim, ((0.0,) * z_dim, (1.0,) * z_dim))
        # Plain numbers, so that no change of the weights' dtype rounds them and no checkpoint needs them.
        self.latents_mean = tuple(mean if latents_mean is None else latents_mean)
        self.latents_std = tuple(std if latents_std is None else latents_std)
        for name in ("latents_mean", "latents_std"):
            if (count := len(getattr(self, name))) != z_dim:
                raise ValueError(f"{name} must have z_dim = {z_dim} entries; got {count}")
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std must be positive; got {self.latents_std}")

        # Channels of the encoder's and the decoder's levels, in their order.
        self.widths = tuple(dim * multiple for multiple in dim_mult)
        self.decoder_widths = tuple((dec_dim or dim) * multiple for multiple in reversed(dim_mult))
        self.encoder = Encoder(dim, z_dim, self.widths, num_res_blocks, self.temporal, residual)
        self.conv1 = nn.Conv3d(2 * z_dim, 2 * z_dim, 1)
        self.conv2 = nn.Conv3d(z_dim, z_dim, 1)
        self.decoder = Decoder(z_dim, self.decoder_widths, num_res_blocks, self.temporal[::-1], residual)

    def encode(
        self,
        video: Tensor,
        tiled: bool = False,
        tile_size: tuple[int, int] = (34, 34),
        tile_stride: tuple[int, int] = (18, 16),
    ) -> Tensor:
        """Encode a video as normalised latents [B, z, F, h, w], float32, on `self.device`.

        If T is not 4k + 1 (k times the temporal factor, plus 1), the last frame is repeated up to there.

        Args:
            video: [B, 3, T, H, W] in [-1, 1], of any floating type on any device; it is moved chunk by chunk.
            tiled: cut the frames into overlapping tiles, which takes less memory and is near to the untiled
                result.
            tile_size: size of a tile, (rows, columns) in latent positions.
            tile_stride: distance from tile to tile, likewise.

        Raises:
            TypeError: the video is not of a floating type.
            ValueError: a wrong shape, or a tiling that leaves gaps.
        """
        self._check_video(video)
        batch, _, num_frames, height, width = video.shape
        center, inverse_std = self._statistics()
        shape = height // self.spatial_factor, width // self.spatial_factor

        def encode_tile(tile: Tile) -> Iterator[Tensor]:
            yield (self.encode_moments(video[tile.area(self.spatial_factor)])[0] - center) * inverse_std

        num_latents = -(-(num_frames - 1) // self.temporal_factor) + 1
        size = batch, self.z_dim, num_latents, *shape
        latents = torch.zeros(size, dtype=torch.float32, device=self.device)
        return self.blend(TileGrid.of(shape, tiled, tile_size, tile_stride), latents, 1, encode_tile)

    def encode_moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B, z, F, h, w], float32, not normalised; else as `encode`."""
        self._check_video(video)
        cache: Cache = {}
        moments = [
            self.conv1(self.encoder(chunk.to(self.device, self.dtype), cache)).float()
            for chunk in _video_chunks(video, self.temporal_factor)
        ]
        mean, log_variance = torch.cat(moments, dim=2).chunk(2, dim=1)
        return mean, log_variance

    def decode(
        self,
        latents: Tensor,
        tiled: bool = False,
        tile_size: tuple[int, int] = (34, 34),
        tile_stride: tuple[int, int] = (18, 16),
        num_frames: int | None = None,
    ) -> Tensor:
        """Decode latents to a video [B, 3, T, H, W] in [-1, 1], float32, on `self.device`.

        Args:
            latents: normalised, [B, z, F, h, w].
            num_frames: return only so many of the first frames, and compute no more than they need.
            tiled, tile_size, tile_stride: as in `encode`.

        Raises:
            ValueError: a wrong shape, num_frames out of range, or a tiling that leaves gaps.
        """
        self._check_latents(latents)
        batch, _, num_latents, rows, cols = latents.shape
        available = self.temporal_factor * (num_latents - 1) + 1
        num_frames = available if num_frames is None else num_frames
        if not 1 <= num_frames <= available:
            raise ValueError(f"num_frames must be 1 to {available} for these latents; got {num_frames}")
        grid = TileGrid.of((rows, cols), tiled, tile_size, tile_stride)
        size = batch, IMAGE_CHANNELS, num_frames, rows * self.spatial_factor, cols * self.spatial_factor
        video = torch.zeros(size, dtype=torch.float32, device=self.device)

        def decode_tile(tile: Tile) -> Iterator[Tensor]:
            return self._pixel_chunks(latents[tile.area()], num_frames)

        return self.blend(grid, video, self.spatial_factor, decode_tile).clamp_(-1, 1)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Yield the frames of `decode` one first, then `temporal_factor` at a time: [B, 3, t, H, W], float32.

        Peak memory does not depend on F.

        Raises:
            ValueError: latents of a wrong shape, at the call.
        """
        self._check_latents(latents)
        num_frames = self.temporal_factor * (latents.shape[2] - 1) + 1
        return (chunk.clamp(-1, 1) for chunk in self._pixel_chunks(latents, num_frames))

    def _pixel_chunks(self, latents: Tensor, num_frames: int) -> Iterator[Tensor]:
        """Chunks of the first num_frames frames, float32, not clamped."""
        cache: Cache = {}
        center, inverse_std = self._statistics()
        for latent_frame in latents.split(1, dim=2):
            if num_frames <= 0:
                return
            mean = (latent_frame.to(self.device, torch.float32) / inverse_std + center).to(self.dtype)
            chunk = self.decoder(self.conv2(mean), cache)[:, :, :num_frames].float()
            num_frames -= chunk.shape[2]
            yield chunk

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std, by which the official code multiplies and divides, float32 [z, 1, 1, 1]."""
        rows = table((self.latents_mean, self.latents_std), self.device, torch.float32)
        mean, std = rows[..., None, None, None]
        return mean, 1 / std

    def _check_video(self, video: Tensor) -> None:
        if video.ndim != 5 or video.shape[1] != IMAGE_CHANNELS or video.shape[2] == 0:
            raise ValueError(f"video must be [B, {IMAGE_CHANNELS}, T >= 1, H, W]; got {list(video.shape)}")
        if not video.is_floating_point():
            raise TypeError(f"video must be of a floating type with values in [-1, 1]; got {video.dtype}")
        height, width = video.shape[3:]
        if min(height, width) < 1 or height % self.spatial_factor or width % self.spatial_factor:
            raise ValueError(f"sides must be multiples of {self.spatial_factor}; got {height} x {width}")

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.z_dim or 0 in latents.shape:
            raise ValueError(f"latents must be [B, {self.z_dim}, F, h, w], not 0; got {list(latents.shape)}")


def _video_chunks(video: Tensor, step: int) -> Iterator[Tensor]:
    """The first frame, then `step` frames at a time; the last frame is repeated to fill up the last chunk."""
    yield video[:, :, :1]
    for chunk in video[:, :, 1:].split(step, dim=2) if video.shape[2] > 1 else ():
        missing = step - chunk.shape[2]
        yield torch.cat([chunk, *[chunk[:, :, -1:]] * missing], dim=2) if missing else chunk


def vae_config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict:
    """Return the arguments of `WanVideoVAE` or `WanVideoVAE22` that official names and shapes tell."""
    for key in ("encoder.conv1.weight", "conv2.weight"):
        if key not in shapes:
            raise ValueError(f"not a Wan VAE: there is no tensor {key}")
    found = (re.match(r"encoder\.downsamples\.(\d+)\.(?:downsamples\.(\d+)\.)?", key) for key in shapes)
    blocks = {match[0]: (int(match[1]), int(match[2] or 0)) for match in found if match}
    residual = any(block.count("downsamples") == 2 for block in blocks)
    channels = IMAGE_CHANNELS * (PATCH**2 if residual else 1)
    dim, *rest = shapes["encoder.conv1.weight"]
    if rest != [channels, 3, 3, 3]:
        raise ValueError(
            f"not a Wan VAE: conv1.weight must be [dim, {channels}, 3, 3, 3]; got {[dim, *rest]}"
        )
    widths: list[list[int]] = [[]]  # of the residual blocks, level by level
    temporal = []
    for block in sorted(blocks, key=blocks.__getitem__):
        if f"{block}residual.6.weight" in shapes:
            widths[-1].append(shapes[f"{block}residual.6.weight"][0])
        elif f"{block}resample.1.weight" in shapes:
            temporal.append(f"{block}time_conv.weight" in shapes)
            widths.append([])
        else:
            raise ValueError(f"not a Wan VAE: {block[:-1]} is neither a residual block nor a resampling")
    num_res_blocks = len(widths[0])
    if any(not level or len(level) != num_res_blocks or level[-1] % dim for level in widths):
        raise ValueError(
            "not a Wan VAE: levels of the encoder must have equally many residual blocks, of widths that are "
            f"multiples of {dim}; got widths {widths}"
        )
    config = {
        "dim": dim,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": tuple(level[-1] // dim for level in widths),
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": tuple(temporal),
    }
    if residual:
        config["dec_dim"] = shapes["decoder.conv1.weight"][0] * dim // widths[-1][-1]
    return config
