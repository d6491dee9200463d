"""The VAE of Wan2.2's TI2V-5B, under the official state-dict keys: 48 channels, cells of 4 x 16 x 16.

It runs as `wan_video_vae` does, on the same blocks: pixels are first folded two by two into channels, each
level has a shortcut without weights, and the decoder is wider than the encoder.
"""

from typing import Any

from diffsynth.models.wan_video_vae import WanVideoVAE


class WanVideoVAE22(WanVideoVAE):
    """Video VAE: [B, 3, T, H, W] in [-1, 1] <-> normalised latents [B, z, F, H / 16, W / 16].

    Calls and all arguments are those of `WanVideoVAE`.
    """

    def __init__(self, dim: int = 160, dec_dim: int = 256, z_dim: int = 48, **others: Any) -> None:
        super().__init__(dim, z_dim, dec_dim=dec_dim, **others)
