"""The VAE's tiles over several ranks: what one process gives, bit-identical, each tile computed once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from diffsynth.distributed.sequence import replaced
from diffsynth.distributed.tiles import spread_blend
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae_tiling import blend

TILES = {"tiled": True, "tile_size": (4, 4), "tile_stride": (2, 3)}  # 3 x 2 of them


def counting(real: Callable[..., Any], counted: list[Any]) -> Callable[..., Any]:
    return lambda *inputs: counted.append(inputs) or real(*inputs)


def coded(ranks: bool = True) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Latents and frames of a video, and how many tiles this process has computed for them."""
    torch.manual_seed(0)
    vae = WanVideoVAE(dim=4, z_dim=4, dim_mult=(1, 1, 1, 1), num_res_blocks=1).requires_grad_(False)
    video, counted = torch.rand(1, 3, 9, 64, 56) * 2 - 1, []
    for name in ("encode_moments", "_pixel_chunks"):
        setattr(vae, name, counting(getattr(vae, name), counted))
    if not ranks:
        latents = vae.encode(video, **TILES)
        return latents, vae.decode(latents, num_frames=7, **TILES), len(counted)
    with replaced((vae, "blend", spread_blend)):
        latents = vae.encode(video, **TILES)
        frames, number = vae.decode(latents, num_frames=7, **TILES), len(counted)
        whole = vae.decode(latents)
        # The others have no part in what is decoded whole.
        assert (whole.count_nonzero() == 0) == (len(counted) == number) == (dist.get_rank() > 0)
    assert vae.blend is blend
    return latents, frames, number


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_computes_its_tiles_and_has_all(size):
    latents, frames, number = coded(ranks=False)
    assert number == 12
    found = on_ranks(size, coded)
    for spread_latents, spread_frames, _ in found:
        assert torch.equal(spread_latents, latents)
        assert torch.equal(spread_frames, frames)
    assert sum(own for *_, own in found) == number
    assert max(own for *_, own in found) == 2 * -(-6 // size)
