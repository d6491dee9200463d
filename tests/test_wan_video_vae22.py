"""The VAE of Wan2.2-TI2V-5B against golden tensors of the official code."""

import json

import pytest
import torch

from diffsynth.models.wan_video_vae import vae_config_from_shapes
from diffsynth.models.wan_video_vae22 import WanVideoVAE22
from diffsynth.models.wan_video_vae_keys import diffusers_vae_key_map
from diffsynth.models.wan_video_vae_layers import average_down, duplicate_up

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def vae(golden) -> WanVideoVAE22:
    weights, info = golden("vae22_tiny_weights")
    vae = WanVideoVAE22(**info["kwargs"]).requires_grad_(False)
    vae.load_state_dict(weights, strict=True)
    return vae


def test_golden_tolerances_are_the_ones_used_here(golden):
    for name in ("io", "stages", "frames"):
        assert golden(f"vae22_tiny_{name}")[1]["tolerance"]["float32"] == CLOSE


def test_encoding_gives_the_published_moments_and_latents(vae, golden):
    g, _ = golden("vae22_tiny_io")
    mean, log_variance = vae.encode_moments(g["video"])
    torch.testing.assert_close(mean, g["latents_mean_raw"], **CLOSE)
    torch.testing.assert_close(log_variance.clamp(-30, 20), g["latents_logvar"], **CLOSE)
    torch.testing.assert_close(vae.encode(g["video"]), g["latents"], **CLOSE)


@pytest.mark.parametrize(
    ("latents", "pixels"),
    [("latents", "decoded_unclamped"), ("latents_of_noise", "decoded_of_noise_unclamped")],
)
def test_decoding_gives_the_published_pixels_clamped(vae, golden, latents, pixels):
    g, _ = golden("vae22_tiny_io")
    torch.testing.assert_close(vae.decode(g[latents]), g[pixels].clamp(-1, 1), **CLOSE)
    chunks = list(vae.decode_chunks(g[latents]))
    assert [chunk.shape[2] for chunk in chunks] == [1] + [4] * (g[latents].shape[2] - 1)
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(g[latents]))


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_videos_of_every_number_of_chunks_encode_and_decode(vae, golden, frames):
    g, _ = golden("vae22_tiny_frames")
    latents = vae.encode(g["video"][:, :, :frames])
    torch.testing.assert_close(latents, g[f"t{frames}.latents"], **CLOSE)
    decoded = vae.decode(g[f"t{frames}.latents"])
    torch.testing.assert_close(decoded, g[f"t{frames}.decoded_unclamped"].clamp(-1, 1), **CLOSE)
    assert torch.equal(latents[:, :, :1], vae.encode(g["video"][:, :, :1]))
    assert torch.equal(decoded[:, :, :1], vae.decode(g[f"t{frames}.latents"][:, :, :1]))


def test_a_batch_encodes_and_no_frame_is_dropped(vae, golden):
    g, _ = golden("vae22_tiny_frames")
    torch.testing.assert_close(vae.encode(g["batch2.video"]), g["batch2.latents"], **CLOSE)
    seven = g["video"][:, :, :7]
    filled = torch.cat([seven, seven[:, :, -1:].repeat(1, 1, 2, 1, 1)], dim=2)
    assert torch.equal(vae.encode(seven), vae.encode(filled))


def test_every_stage_gives_the_published_tensors_chunk_by_chunk(vae, golden):
    g, _ = golden("vae22_tiny_stages")
    stages = {"enc.conv1": vae.encoder.conv1, "enc.middle": vae.encoder.middle[-1], "enc.out": vae.encoder}
    stages |= {f"enc.down.{i}": level for i, level in enumerate(vae.encoder.downsamples)}
    stages |= {"dec.conv1": vae.decoder.conv1, "dec.middle": vae.decoder.middle[-1]}
    stages |= {f"dec.up.{i}": level for i, level in enumerate(vae.decoder.upsamples)}
    stages["dec.out"] = vae.decoder.head["2"]
    outputs = {name: [] for name in stages}
    hooks = [
        module.register_forward_hook(lambda _, __, out, to=outputs[name]: to.append(out))
        for name, module in stages.items()
    ]
    vae.encode(g["video"])
    vae.decode(g["latents"])
    for hook in hooks:
        hook.remove()
    for name, chunks in outputs.items():
        assert len(chunks) == 3
        for index, chunk in enumerate(chunks):
            torch.testing.assert_close(chunk, g[f"{name}.chunk{index}"], **CLOSE)


def test_shortcuts_without_weights_equal_the_published_ones(golden):
    g, _ = golden("vae22_tiny_stages")
    for out, time in ((8, 2), (4, 1), (16, 2)):
        torch.testing.assert_close(
            average_down(g["ops.small"], out, time, 2), g[f"avg_down.4_{out}_t{time}_s2"], **CLOSE
        )
    for out, time in ((8, 2), (4, 1), (4, 2)):
        for first, ending in ((False, ""), (True, ".first")):
            grown = duplicate_up(g["ops.deep"], out, time, 2, first)
            assert torch.equal(grown, g[f"dup_up.8_{out}_t{time}_s2{ending}"])


def test_tiles_are_near_to_the_whole_and_one_tile_is_the_whole(vae):
    torch.manual_seed(0)
    latents = torch.randn(1, 48, 2, 4, 6)
    whole = vae.decode(latents)
    assert torch.equal(vae.decode(latents, tiled=True, tile_size=(4, 6), tile_stride=(2, 3)), whole)
    tiled = vae.decode(latents, tiled=True, tile_size=(3, 4), tile_stride=(1, 2))
    assert tiled.shape == whole.shape == (1, 3, 5, 64, 96)
    assert (tiled - whole).abs().mean() < 0.3
    assert vae.encode(whole, tiled=True, tile_size=(3, 4), tile_stride=(1, 2)).shape == latents.shape


def test_sizes_are_multiples_of_sixteen(vae):
    with pytest.raises(ValueError, match="multiples of 16; got 24 x 32"):
        vae.encode(torch.zeros(1, 3, 1, 24, 32))


def test_the_published_model_has_the_official_names_and_shapes_in_both_layouts(golden_dir):
    published = json.loads((golden_dir / "wan_family_keys.json").read_text())["Wan2.2_VAE.pth"]
    expected = {key: tuple(shape) for key, shape in published["shapes"].items()}
    config = vae_config_from_shapes(expected)
    with torch.device("meta"):
        vae = WanVideoVAE22()
        assert {key: value.shape for key, value in WanVideoVAE22(**config).state_dict().items()} == expected
    assert {key: tuple(value.shape) for key, value in vae.state_dict().items()} == expected
    assert config["dec_dim"] == 256
    assert sum(p.numel() for p in vae.parameters()) == published["parameters"] == 704_688_668
    assert (vae.spatial_factor, vae.temporal_factor, vae.z_dim) == (16, 4, 48)
    names = published["official_to_diffusers"]
    theirs = {name: expected[key] for key, name in names.items()}
    assert diffusers_vae_key_map(theirs) == {name: key for key, name in names.items()}


def test_gradients_pass_through_the_streamed_levels():
    torch.manual_seed(0)
    vae = WanVideoVAE22(dim=4, dec_dim=4, z_dim=2, dim_mult=(1, 1), temperal_downsample=(True,))
    decoded = vae.decode(vae.encode(torch.rand(1, 3, 5, 8, 8)))
    decoded.square().mean().backward()
    assert [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
