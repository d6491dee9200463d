"""The VAE against golden tensors of published implementations, and what holds for any VAE of its kind."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from diffsynth.configs.checkpoints import LATENT_STATISTICS
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.models.wan_video_vae_layers import CausalConv3d, ChannelNorm

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ODD_CONFIGS = [
    {"dim": 4, "z_dim": 4, "dim_mult": (1, 2, 4), "num_res_blocks": 1, "temperal_downsample": (True, True)},
    {"dim": 6, "z_dim": 3, "dim_mult": (1, 2), "num_res_blocks": 3, "temperal_downsample": (True,)},
    {"dim": 4, "z_dim": 5, "dim_mult": (2, 1, 3), "num_res_blocks": 2, "temperal_downsample": (False, False)},
    {"dim": 2, "z_dim": 2, "dim_mult": (3,), "num_res_blocks": 1, "temperal_downsample": ()},
    {
        "dim": 2,
        "z_dim": 2,
        "dim_mult": (1, 1, 2, 2, 2),
        "num_res_blocks": 1,
        "temperal_downsample": (True, False, True, True),
    },
]


@pytest.fixture(scope="module")
def vae(golden) -> WanVideoVAE:
    weights, _ = golden("vae_tiny_weights")
    return load(weights)


def load(weights: dict[str, torch.Tensor]) -> WanVideoVAE:
    vae = WanVideoVAE(dim=4).requires_grad_(False)
    vae.load_state_dict(weights, strict=True)
    return vae


def on_meta(**config) -> WanVideoVAE:
    with torch.device("meta"):
        return WanVideoVAE(**config)


def seeded(config: dict) -> WanVideoVAE:
    torch.manual_seed(0)
    return WanVideoVAE(**config).requires_grad_(False)


# Golden tensors


def test_golden_tolerances_are_the_ones_used_here(golden):
    for name in ("io", "stages", "frames", "tiled"):
        assert golden(f"vae_tiny_{name}")[1]["tolerance"]["float32"] == CLOSE


def test_encoding_gives_the_published_moments_and_latents(vae, golden):
    expected, _ = golden("vae_tiny_io")
    mean, log_variance = vae.encode_moments(expected["video"])
    torch.testing.assert_close(mean, expected["latents_mean_raw"], **CLOSE)
    torch.testing.assert_close(log_variance.clamp(-30, 20), expected["latents_logvar"], **CLOSE)
    torch.testing.assert_close(vae.encode(expected["video"]), expected["latents"], **CLOSE)


def test_decoding_gives_the_published_pixels_clamped(vae, golden):
    expected, _ = golden("vae_tiny_io")
    pixels = expected["decoded_unclamped"].clamp(-1, 1)
    torch.testing.assert_close(vae.decode(expected["latents"]), pixels, **CLOSE)
    chunks = list(vae.decode_chunks(expected["latents"]))
    assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(chunks, dim=2), vae.decode(expected["latents"]))


def test_every_stage_gives_the_published_tensors_chunk_by_chunk(vae, golden):
    expected, info = golden("vae_tiny_stages")
    names = [name.removeprefix("stage.") for name in expected if name.startswith("stage.")]
    outputs = {name: [] for name in names}
    hooks = [
        vae.get_submodule(name).register_forward_hook(lambda _, __, out, to=outputs[name]: to.append(out))
        for name in names
    ]
    vae.encode(expected["video"])
    vae.decode(expected["latents"])
    for hook in hooks:
        hook.remove()
    assert len(names) == 38
    for name in names:
        torch.testing.assert_close(torch.cat(outputs[name], dim=2), expected[f"stage.{name}"], **CLOSE)
        if name not in ("conv1", "conv2"):  # pointwise in time; run per chunk here, at once there
            assert [out.shape[2] for out in outputs[name]] == info["frames_per_chunk"][name]


def test_a_single_image_encodes_and_decodes(vae, golden):
    expected, _ = golden("vae_tiny_frames")
    torch.testing.assert_close(vae.encode(expected["single_video"]), expected["single_latents"], **CLOSE)
    decoded = vae.decode(expected["single_latents"])
    torch.testing.assert_close(decoded, expected["single_decoded"].clamp(-1, 1), **CLOSE)


@pytest.mark.parametrize("name", ["t18", "t30"])
def test_no_frame_is_dropped_when_the_count_is_not_4k_plus_1(vae, golden, name):
    expected, _ = golden("vae_tiny_frames")
    video = expected[f"{name}_video"]
    latents = vae.encode(video)
    torch.testing.assert_close(latents, expected[f"{name}_repeat_last_latents"], **CLOSE)
    torch.testing.assert_close(latents[:, :, :-1], expected[f"{name}_latents"], **CLOSE)
    decoded = vae.decode(latents, num_frames=video.shape[2])
    torch.testing.assert_close(decoded, expected[f"{name}_repeat_last_decoded_cut"].clamp(-1, 1), **CLOSE)
    shorter = vae.decode(expected[f"{name}_latents"])
    torch.testing.assert_close(shorter, expected[f"{name}_decoded"].clamp(-1, 1), **CLOSE)


def test_bfloat16_stays_within_its_known_distance_from_float32(golden):
    weights, _ = golden("vae_tiny_weights")
    expected, _ = golden("vae_tiny_io")
    half = load(weights).to(torch.bfloat16)
    latents, pixels = half.encode(expected["video"]), half.decode(expected["latents"])
    assert half.dtype == torch.bfloat16
    assert latents.dtype == pixels.dtype == torch.float32
    assert 1e-4 < (latents - expected["latents"]).abs().max() < 0.07
    assert (
        1e-4 < (pixels - expected["decoded_unclamped"].clamp(-1, 1)).abs().max() < 0.36
    )  # 0.31 to 0.34 by build


# Streaming


@pytest.mark.parametrize("lengths", [(1, 4, 4), (1, 1, 1, 2, 4), (9,)])
def test_a_streamed_causal_convolution_equals_one_over_the_whole_sequence(lengths):
    torch.manual_seed(0)
    conv = CausalConv3d(3, 5)
    x = torch.randn(2, 3, sum(lengths), 4, 6)
    whole = F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0)), conv.weight, conv.bias)
    cache = {}
    streamed = torch.cat([conv(conv.with_past(chunk, cache)) for chunk in x.split(lengths, dim=2)], dim=2)
    torch.testing.assert_close(streamed, whole)


def test_latents_do_not_change_with_later_frames(vae):
    torch.manual_seed(1)
    video = torch.rand(1, 3, 17, 16, 16) * 2 - 1
    assert torch.equal(vae.encode(video)[:, :, :3], vae.encode(video[:, :, :9]))


def test_frames_do_not_change_with_later_latents(vae):
    torch.manual_seed(1)
    latents = torch.randn(1, 16, 4, 2, 2)
    assert torch.equal(vae.decode(latents)[:, :, :5], vae.decode(latents[:, :, :2]))


def test_nothing_of_a_call_stays_after_it(vae, monkeypatch):
    cached = []
    for half in (vae.encoder, vae.decoder):
        forward = type(half).forward

        def watched(self, x, cache, forward=forward):
            out = forward(self, x, cache)
            cached.extend(weakref.ref(value) for value in cache.values())
            return out

        monkeypatch.setattr(type(half), "forward", watched)
    vae.decode(vae.encode(torch.zeros(1, 3, 5, 16, 16)))
    assert len(cached) == 2 * (24 + 32)  # two chunks of layers that look back, in encoder and decoder
    assert not any(reference() is not None for reference in cached)


def test_the_cache_holds_two_frames_a_layer_and_not_the_chunks_they_are_from(vae):
    cache = {}
    with torch.no_grad():
        for _ in range(3):
            vae.decoder(torch.zeros(1, 16, 1, 2, 2), cache)
    for value in cache.values():
        assert value.shape[2] == 2
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_two_streams_at_once_do_not_disturb_each_other(vae):
    torch.manual_seed(2)
    first, second = torch.randn(2, 1, 16, 3, 2, 2)
    pairs = list(zip(vae.decode_chunks(first), vae.decode_chunks(second), strict=True))
    assert torch.equal(torch.cat([a for a, _ in pairs], dim=2), vae.decode(first))
    assert torch.equal(torch.cat([b for _, b in pairs], dim=2), vae.decode(second))


def test_decoding_stops_when_it_has_the_frames_asked_for(vae):
    latents = torch.zeros(1, 16, 5, 2, 2)
    calls = []
    hook = vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert vae.decode(latents, num_frames=6).shape[2] == 6
    hook.remove()
    assert len(calls) == 3


@pytest.mark.parametrize("config", ODD_CONFIGS)
def test_other_depths_and_temporal_factors_stream_alike(config):
    vae = seeded(config)
    space, time = vae.spatial_factor, vae.temporal_factor
    assert space == 2 ** (len(config["dim_mult"]) - 1)
    assert time == 2 ** sum(config["temperal_downsample"])
    video = torch.rand(2, 3, 2 * time + 1, 2 * space, 3 * space) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (2, config["z_dim"], 3, 2, 3)
    torch.testing.assert_close(vae.encode(video[:, :, : time + 1]), latents[:, :, :2])
    decoded = vae.decode(latents)
    assert decoded.shape == video.shape
    torch.testing.assert_close(vae.decode(latents[:, :, :2]), decoded[:, :, : time + 1])
    torch.testing.assert_close(vae.decode(latents[1:]), decoded[1:])


# Devices, precision, gradients


@pytest.mark.slow
def test_results_are_on_the_device_of_the_weights_wherever_the_input_is():
    vae = on_meta(dim=4)
    video = torch.zeros(1, 3, 5, 64, 64, dtype=torch.float64)
    for tiling in ({}, {"tiled": True, "tile_size": (4, 4), "tile_stride": (2, 2)}):
        latents = vae.encode(video, **tiling)
        assert (latents.shape, latents.device.type, latents.dtype) == (
            (1, 16, 2, 8, 8), "meta", torch.float32,
        )  # fmt: skip
        pixels = vae.decode(torch.zeros(1, 16, 2, 8, 8), **tiling)
        assert (pixels.shape, pixels.device.type, pixels.dtype) == (video.shape, "meta", torch.float32)


def test_an_input_in_another_floating_type_is_converted(vae):
    video = torch.rand(1, 3, 5, 16, 16).to(torch.bfloat16)
    assert torch.equal(vae.encode(video), vae.encode(video.float()))


def test_statistics_keep_their_precision_and_are_not_in_the_checkpoint():
    vae = WanVideoVAE(dim=2).to(torch.bfloat16)
    assert vae.latents_mean == LATENT_STATISTICS[16][0]
    assert all(value.dtype == torch.float32 for value in vae._statistics())
    assert not any("latents" in key for key in vae.state_dict())
    plain = WanVideoVAE(dim=2, z_dim=3)
    assert (plain.latents_mean, plain.latents_std) == ((0.0,) * 3, (1.0,) * 3)


def test_given_statistics_normalise_the_latents():
    config = ODD_CONFIGS[0]
    statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    vae, plain = seeded(config | statistics), seeded(config)
    video = torch.rand(1, 3, 5, 8, 8)
    latents = vae.encode(video)
    mean, std = (torch.tensor(statistics[name]).view(4, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (vae.encode_moments(video)[0] - mean) / std)
    torch.testing.assert_close(vae.decode(latents), plain.decode(latents * std + mean))


def test_the_norm_sums_in_float32_and_takes_a_zero_vector():
    torch.manual_seed(0)
    x = torch.randn(1, 384, 1, 2, 2) * 30
    norm = ChannelNorm(384)
    expected = norm(x)
    assert torch.allclose(expected.pow(2).mean(dim=1), torch.ones(1, 1, 2, 2), atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        out = norm.to(dtype)(x.to(dtype))
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.01)
        assert torch.equal(norm(torch.zeros_like(out)), torch.zeros_like(out))


def test_gradients_pass_through_the_streamed_layers_correctly():
    vae = seeded(ODD_CONFIGS[0]).double()

    def encode(*frames):
        cache = {}
        return torch.cat([vae.encoder(frame, cache) for frame in frames], dim=2)

    def decode(*frames):
        cache = {}
        return torch.cat([vae.decoder(frame, cache) for frame in frames], dim=2)

    video = [torch.randn(1, 3, t, 4, 4, dtype=torch.float64, requires_grad=True) for t in (1, 4, 4)]
    latents = [torch.randn(1, 4, 1, 1, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(encode, video, fast_mode=True)
    assert torch.autograd.gradcheck(decode, latents, fast_mode=True)


@pytest.mark.parametrize("tiling", [{}, {"tiled": True, "tile_size": (2, 2), "tile_stride": (1, 1)}])
def test_training_gets_gradients_and_the_same_values(tiling):
    vae = seeded(ODD_CONFIGS[0]).requires_grad_(True)
    video = torch.rand(1, 3, 6, 12, 8) * 2 - 1
    with torch.no_grad():
        expected = vae.decode(vae.encode(video, **tiling), num_frames=6, **tiling)
    decoded = vae.decode(vae.encode(video, **tiling), num_frames=6, **tiling)
    torch.testing.assert_close(decoded, expected)
    decoded.square().mean().backward()
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "must be at least 1; got 0, 16, 2"),
        ({"temperal_downsample": (True,)}, "temperal_downsample must have one entry less than dim_mult"),
        ({"latents_mean": [0.0] * 4}, "latents_mean must have z_dim = 16 entries; got 4"),
        ({"latents_std": [0.0] * 16}, "latents_std must be positive"),
    ],
)
def test_arguments_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5, 16, 16), r"video must be \[B, 3, T >= 1, H, W\]; got \[3, 5, 16, 16\]"),
        ((1, 4, 5, 16, 16), r"got \[1, 4, 5, 16, 16\]"),
        ((1, 3, 0, 16, 16), r"T >= 1.*got \[1, 3, 0, 16, 16\]"),
        ((1, 3, 5, 37, 48), "sides must be multiples of 8; got 37 x 48"),
        ((1, 3, 5, 16, 20), "multiples of 8; got 16 x 20"),
        ((1, 3, 5, 0, 16), "multiples of 8; got 0 x 16"),
    ],
)
def test_a_video_of_a_wrong_shape_is_refused(vae, shape, message):
    for method in (vae.encode, vae.encode_moments):
        with pytest.raises(ValueError, match=message):
            method(torch.zeros(shape))


def test_a_video_of_whole_numbers_is_refused(vae):
    with pytest.raises(TypeError, match=r"floating type with values in \[-1, 1\]; got torch.uint8"):
        vae.encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("shape", [(16, 2, 2, 2), (1, 8, 2, 2, 2), (1, 16, 0, 2, 2), (1, 16, 2, 0, 2)])
def test_latents_of_a_wrong_shape_are_refused_at_the_call(vae, shape):
    for method in (vae.decode, vae.decode_chunks):
        with pytest.raises(ValueError, match=r"latents must be \[B, 16, F, h, w\]"):
            method(torch.zeros(shape))


@pytest.mark.parametrize("num_frames", [0, -1, 6])
def test_a_count_of_frames_that_is_not_there_is_refused(vae, num_frames):
    with pytest.raises(ValueError, match=f"num_frames must be 1 to 5 for these latents; got {num_frames}"):
        vae.decode(torch.zeros(1, 16, 2, 2, 2), num_frames=num_frames)
