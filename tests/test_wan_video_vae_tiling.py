"""Tiled encoding and decoding against golden tensors, and what a blend of tiles must keep."""

import pytest
import torch

from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae_tiling import Tile, TileGrid, blend, ramp

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def vae(golden) -> WanVideoVAE:
    weights, _ = golden("vae_tiny_weights")
    vae = WanVideoVAE(dim=4).requires_grad_(False)
    vae.load_state_dict(weights, strict=True)
    return vae


@pytest.mark.parametrize("name", ["tiled0", "tiled1"])
def test_tiles_blend_to_the_published_result(vae, golden, name):
    expected, info = golden("vae_tiny_tiled")
    case = info["upstreams"][name]
    tiling = {"tiled": True, "tile_size": case["tile_size"], "tile_stride": case["tile_stride"]}
    torch.testing.assert_close(vae.encode(expected["video"], **tiling), expected[f"{name}_latents"], **CLOSE)
    decoded = vae.decode(expected["decode_latents"], **tiling)
    torch.testing.assert_close(decoded, expected[f"{name}_decoded"].clamp(-1, 1), **CLOSE)


def test_tiles_of_an_axis_end_with_the_first_that_reaches_the_border(golden):
    _, info = golden("vae_tiny_tiled")
    for case in ("tiled0", "tiled1", "tiled2"):
        case = info["upstreams"][case]
        grid = TileGrid(shape=(6, 8), size=tuple(case["tile_size"]), stride=tuple(case["tile_stride"]))
        assert [[*tile.rows, *tile.cols] for tile in grid.tiles()] == case["tiles_of_decode_latents"]


def test_ramps_rise_from_sides_inside_the_picture_only():
    assert ramp((0, 4), 8, 2, 1).tolist() == [1, 1, 1, 0.5]
    assert ramp((2, 6), 8, 2, 1).tolist() == [0.5, 1, 1, 0.5]
    assert ramp((4, 8), 8, 1, 2).tolist() == [0.5, 1, 1, 1, 1, 1, 1, 1]
    assert ramp((1, 5), 8, 3, 1).tolist() == pytest.approx([1 / 3, 1, 2 / 3, 1 / 3])
    assert ramp((4, 8), 12, 0, 1).tolist() == [1, 1, 1, 1]


def test_tiles_that_agree_blend_to_what_they_agree_on():
    picture = torch.arange(7 * 9 * 4.0).view(1, 1, 1, 14, 18).expand(1, 2, 3, -1, -1)
    grid = TileGrid(shape=(7, 9), size=(4, 5), stride=(3, 2))

    def crop(tile: Tile):
        yield from picture[tile.area(2)].split((1, 2), dim=2)

    torch.testing.assert_close(blend(grid, torch.zeros(1, 2, 3, 14, 18), 2, crop), picture)


def test_one_tile_equals_the_untiled_result_bit_for_bit(vae, golden):
    expected, _ = golden("vae_tiny_tiled")
    tiling = {"tiled": True, "tile_size": (6, 8), "tile_stride": (1, 8)}
    video, latents = expected["video"], expected["decode_latents"]
    assert torch.equal(vae.encode(video, **tiling), vae.encode(video))
    assert torch.equal(vae.decode(latents, **tiling), vae.decode(latents))


def test_tiles_side_by_side_make_hard_borders(vae, golden):
    expected, _ = golden("vae_tiny_tiled")
    latents = expected["decode_latents"]
    tiled = vae.decode(latents, tiled=True, tile_size=(3, 5), tile_stride=(3, 5), num_frames=3)
    alone = vae.decode(latents[..., 3:, 5:], num_frames=3)
    torch.testing.assert_close(tiled[..., 24:, 40:], alone)
    tiled = vae.encode(expected["video"], tiled=True, tile_size=(3, 5), tile_stride=(3, 5))
    torch.testing.assert_close(tiled[..., :3, 5:], vae.encode(expected["video"][..., :24, 40:]))


def test_every_video_of_a_batch_is_tiled_alike(vae, golden):
    expected, _ = golden("vae_tiny_tiled")
    batch = expected["video"][:, :, :1].repeat(2, 1, 1, 1, 1)
    latents = vae.encode(batch, tiled=True, tile_size=(4, 4), tile_stride=(2, 2))
    torch.testing.assert_close(latents[0], latents[1])
    torch.testing.assert_close(
        latents[:, :, :1], expected["tiled0_latents"][:, :, :1].expand(2, -1, -1, -1, -1), **CLOSE
    )


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ((0, 4), (1, 1), "tile_size must be two whole numbers of latents, at least 1"),
        ((4, 4), (0, 4), "tile_stride must be two whole numbers"),
        ((4,), (4, 4), "tile_size must be two whole numbers"),
        ((4.5, 4), (4, 4), "tile_size must be two whole numbers"),
        ((4, 4), (4, 5), r"tile_stride must not exceed tile_size, or gaps are left; got \(4, 5\) > \(4, 4\)"),
    ],
)
def test_a_tiling_that_leaves_gaps_is_refused(vae, size, stride, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(1, 3, 1, 16, 16), tiled=True, tile_size=size, tile_stride=stride)
    with pytest.raises(ValueError, match=message):
        vae.decode(torch.zeros(1, 16, 1, 2, 2), tiled=True, tile_size=size, tile_stride=stride)
