import json

import pytest
import torch

from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_layers import SLICE_TOKENS, FeedForward, RMSNorm, rotary_table, rotate

CONSTRUCTOR = {
    "dim", "in_dim", "ffn_dim", "out_dim", "text_dim", "freq_dim", "num_heads", "num_layers", "text_len",
    "eps", "patch_size",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(golden):
    tensors, info = golden("dit_tiny")
    dit = WanModel(**{name: info["config"][name] for name in CONSTRUCTOR}).eval().requires_grad_(False)
    dit.load_state_dict({key[3:]: value for key, value in tensors.items() if key.startswith("sd.")})
    return dit, tensors, info


@pytest.mark.parametrize("index", [0, 1])
def test_velocity_and_features_equal_the_official_ones(tiny, index):
    dit, g, info = tiny
    inputs = g["in.latents"], g["in.timesteps"][index : index + 1], g["in.context"]
    torch.testing.assert_close(dit(*inputs), g[f"t{index}.velocity"], atol=2e-5, rtol=0)
    q, k = dit.features(*inputs, block=info["captured_block"])
    assert q.shape == (1, 3, 4, 6, 4, 20)
    torch.testing.assert_close(q.flatten(1, 3)[0], g[f"t{index}.block_q"], atol=2e-5, rtol=0)
    torch.testing.assert_close(k.flatten(1, 3)[0], g[f"t{index}.block_k"], atol=2e-5, rtol=0)
    torch.testing.assert_close(q.mean(-2)[0], g[f"t{index}.block_q_headmean"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("index", [0, 1])
def test_every_intermediate_equals_the_official_one(tiny, index):
    dit, g, _ = tiny
    state = dit.embed(g["in.latents"], g["in.timesteps"][index : index + 1], g["in.context"])
    torch.testing.assert_close(state.tokens, g["patch_tokens"], atol=2e-5, rtol=0)
    torch.testing.assert_close(state.context, g["context_embedded"], atol=2e-5, rtol=0)
    torch.testing.assert_close(state.time, g[f"t{index}.time_embedding"], atol=2e-5, rtol=0)
    torch.testing.assert_close(state.modulation, g[f"t{index}.time_projection"], atol=2e-5, rtol=0)
    for stop in range(1, 5):
        hidden = g[f"t{index}.hidden_after_block.{stop - 1}"]
        torch.testing.assert_close(dit.run_blocks(state, stop), hidden, atol=2e-5, rtol=0)


def test_features_run_no_block_from_the_asked_one_on(tiny):
    dit, g, _ = tiny
    calls = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, block in enumerate(dit.blocks)
    ]
    dit.features(g["in.latents"], g["in.timesteps"][:1], g["in.context"], block=2)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1]


def test_checkpointed_features_give_the_same_gradient(tiny):
    dit, g, _ = tiny
    gradients = []
    for checkpoint in ("none", "block", "attention"):
        x = g["in.latents"].clone().requires_grad_()
        arguments = (x, g["in.timesteps"][:1], g["in.context"])
        q, k = dit.features(*arguments, block=3, checkpoint=checkpoint)
        (gradient,) = torch.autograd.grad(q.square().sum() + k.sum(), x)
        gradients.append(gradient)
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_batch_gives_what_its_members_give_alone(tiny):
    dit, g, _ = tiny
    x = torch.cat([g["in.latents"], g["in.latents"].flip(-1)])
    context = torch.cat([g["in.context"], g["in.context"].roll(1, 1)])
    both = dit(x, g["in.timesteps"], context)
    for i in range(2):
        alone = dit(x[i : i + 1], g["in.timesteps"][i : i + 1], context[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone, atol=2e-5, rtol=0)


def test_bfloat16_weights_keep_float32_streams_and_stay_close(tiny):
    dit, g, info = tiny
    inputs = g["in.latents"], g["in.timesteps"][:1], g["in.context"]
    half = WanModel(**{name: info["config"][name] for name in CONSTRUCTOR}).bfloat16().requires_grad_(False)
    half.load_state_dict(dit.state_dict())
    state = half.embed(*inputs)
    assert (state.tokens.dtype, state.time.dtype, state.context.dtype) == (
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    velocity = half(*inputs)
    assert velocity.dtype == torch.float32
    assert (velocity - g["t0.velocity"]).abs().max() < 0.06


@pytest.mark.parametrize("head_dim", [4, 10, 12, 16, 22, 28, 128])
def test_rotary_scores_depend_on_relative_position_only(head_dim):
    """Every even head width works, also those where head_dim // 3 is odd."""
    rope = rotary_table((3, 4, 5), head_dim, torch.device("cpu"), torch.float64)
    q = rotate(torch.randn(head_dim, dtype=torch.float64).expand(1, 60, 1, -1), rope)[0, :, 0]
    k = rotate(torch.randn(head_dim, dtype=torch.float64).expand(1, 60, 1, -1), rope)[0, :, 0]
    scores = (q @ k.T).reshape(3, 4, 5, 3, 4, 5)
    torch.testing.assert_close(scores[0, 0, 0, 1, 2, 1], scores[1, 1, 3, 2, 3, 4])
    torch.testing.assert_close(scores[2, 3, 4, 0, 1, 2], scores[2, 2, 3, 0, 0, 1])


def test_rms_norm_is_over_the_full_width_in_float32():
    norm = RMSNorm(8, eps=1e-6).bfloat16()
    x = torch.full((1, 8), 300.0, dtype=torch.bfloat16)
    torch.testing.assert_close(norm(x), torch.ones(1, 8, dtype=torch.bfloat16))


def test_the_sliced_feed_forward_is_the_whole_one():
    torch.manual_seed(0)
    layer, x = FeedForward(4, 8), torch.randn(2, SLICE_TOKENS + 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer[2](layer[1](layer[0](x))))


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B", "Wan2.1-I2V-14B"])
def test_published_models_have_exactly_the_official_keys_and_shapes(golden_dir, model):
    entry = json.loads((golden_dir / "wan_configs.json").read_text())["models"][model]
    arguments = {name: entry["constructor"][name] for name in CONSTRUCTOR}
    with torch.device("meta"):
        dit = WanModel(**arguments, has_image_input=entry["constructor"]["model_type"] == "i2v")
    shapes = {key: list(value.shape) for key, value in dit.state_dict().items()}
    assert shapes == entry["keys"]
    assert sum(p.numel() for p in dit.parameters()) == entry["derived"]["parameters"]


def test_an_image_model_attends_to_its_image_tokens():
    torch.manual_seed(0)
    dit = WanModel(
        dim=24, in_dim=8, ffn_dim=32, out_dim=4, text_dim=6, freq_dim=16, num_heads=2, num_layers=2,
        text_len=5, has_image_input=True,
    ).requires_grad_(False)  # fmt: skip
    x, y, t, context = (
        torch.randn(1, 4, 2, 4, 4),
        torch.randn(1, 4, 2, 4, 4),
        torch.tensor([500.0]),
        torch.randn(1, 3, 6),
    )
    clip = torch.randn(1, 7, 1280)
    velocity = dit(x, t, context, clip_feature=clip, y=y)
    assert velocity.shape == x.shape
    assert (velocity - dit(x, t, context, clip_feature=clip.roll(1, -1), y=y)).abs().max() > 1e-3
    # Image tokens are a set: their order carries nothing.
    torch.testing.assert_close(
        velocity, dit(x, t, context, clip_feature=clip.flip(1), y=y), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs clip_feature"):
        dit(x, t, context, y=y)


def test_a_call_without_autograd_leaves_later_gradients_possible(tiny):
    dit, g, _ = tiny
    x, t, context = g["in.latents"].repeat(1, 1, 2, 1, 1), g["in.timesteps"][:1], g["in.context"]
    with torch.inference_mode():
        dit(x, t, context)
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dit.features(x, t, context, block=1)[0].sum(), x)
    assert gradient.isfinite().all()


def test_sizes_that_do_not_fit_are_named(tiny):
    dit, g, _ = tiny
    x, t, context = g["in.latents"], g["in.timesteps"][:1], g["in.context"]
    with pytest.raises(ValueError, match=r"x must be \[B, 16, F, h, w\]"):
        dit(x[..., :-1], t, context)
    with pytest.raises(ValueError, match=r"x must be \[B, 16, F, h, w\]"):
        dit(x[:, :4], t, context)
    with pytest.raises(ValueError, match="at most 16, 48"):
        dit(x, t, torch.zeros(1, 17, 48))
    with pytest.raises(ValueError, match=r"block must be in 0\.\.3.*got 14"):
        dit.features(x, t, context)
    with pytest.raises(ValueError, match="clip_feature"):
        dit(x, t, context, clip_feature=torch.zeros(1, 257, 1280))
    with pytest.raises(ValueError, match=r"timestep must be \[B\]"):
        dit(x, t[0], context)
    with pytest.raises(ValueError, match=r"context must be"):
        dit(x, t, context[0])
    with pytest.raises(ValueError, match="even head width"):
        WanModel(dim=15, in_dim=4, ffn_dim=8, out_dim=4, text_dim=6, freq_dim=16, num_heads=3, num_layers=1)
