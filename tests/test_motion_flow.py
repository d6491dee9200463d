"""Flows: known motion gives known flow, tile and dense agree, gradients are right, any grid works."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffsynth.motion import attention_motion_flow, frame_pairs, tile_motion_flow
from diffsynth.motion.flow import token_positions
from diffsynth.motion.heads import average_token_groups, reduce_heads
from diffsynth.motion.losses import amf_loss, mean_change, pair_weights, window_means
from diffsynth.motion.tile_flow import centre_positions


def moving_features(frames, rows, cols, shift, width=48, seed=0, dtype=torch.float64):
    """Distinct features; frame j is frame 0 moved by j * shift tokens, around the borders."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, cols, width, generator=generator, dtype=torch.float64)
    first = first / first.norm(dim=-1, keepdim=True) * width**0.5
    steps = [first.roll((j * shift[0], j * shift[1]), (0, 1)) for j in range(frames)]
    return torch.stack(steps).to(dtype)


def random_features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, -2), (2, 3), (-1, 1)])
@pytest.mark.parametrize("kind", ["dense", "tile"])
def test_motion_by_n_tokens_gives_a_flow_of_n(shift, kind):
    x = moving_features(4, 16, 24, shift)
    options = {"sf": 3, "tau": 60.0}
    if kind == "dense":
        flow = attention_motion_flow(x, x, **options)
    else:
        flow = tile_motion_flow(x, x, window=9, tile=(3, 4), **options).flow
    for pair, (i, j) in zip(flow, frame_pairs(4, 3), strict=True):
        expected = torch.tensor([(j - i) * shift[0], (j - i) * shift[1]], dtype=torch.float64)
        inner = pair[6:-6, 8:-8]
        torch.testing.assert_close(inner, expected.expand_as(inner), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(6, 8), (7, 9), (5, 4), (2, 13)])
@pytest.mark.parametrize("heads", ["mean_qk", "mean_logits", [0, 2]])
def test_tile_flow_is_dense_flow_where_the_window_covers_the_grid(grid, heads):
    q, k = random_features(3, *grid, 3, 8)
    tiled = tile_motion_flow(q, k, sf=3, window=15, tile=(3, 4), tau=2.0, heads=heads)
    torch.testing.assert_close(tiled.flow, attention_motion_flow(q, k, sf=3, tau=2.0, heads=heads))


def test_dense_flow_is_the_formula():
    q, k = random_features(2, 3, 4, 5)
    flow = attention_motion_flow(q, k, pairs=[(1, 0)], tau=1.7)
    weights = (1.7 * q[1].reshape(12, 5) @ k[0].reshape(12, 5).T / math.sqrt(5)).softmax(-1)
    own = token_positions(3, 4, q)
    torch.testing.assert_close(flow[0].reshape(12, 2), weights @ own - own)


class Ops(TorchDispatchMode):
    """Inside this context, the names of the operations that run and the most elements of one result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names.add(function.__name__)
        results = (x for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        self.largest = max([self.largest, *(x.numel() for x in results)])
        return out


@pytest.mark.parametrize("width", [5, 16, 128])
@pytest.mark.parametrize("queries", ["all", "one a tile"])
def test_dense_looks_run_a_fused_kernel_and_hold_no_matrix_of_all_logits(width, queries):
    """With values of two columns PyTorch would take its math kernel, without a word."""
    q, k = (x.float().requires_grad_() for x in random_features(2, 24, 30, width))
    with Ops() as ops:
        if queries == "all":
            attention_motion_flow(q, k, sf=2).square().sum().backward()
        else:
            centre_positions(q, k, [(0, 1)], (3, 4), 1.0, 4).sum().backward()
    fused = "_scaled_dot_product_flash_attention_for_cpu"
    assert {f"{fused}.default", f"{fused}_backward.default"} <= ops.names
    assert not any("math" in name or "softmax" in name for name in ops.names)
    assert ops.largest <= 2 * 24 * 30 * width


@pytest.mark.gpu
def test_dense_looks_run_a_fused_kernel_on_cuda():
    q, k = (x.float().cuda().requires_grad_() for x in random_features(2, 24, 30, 128))
    with Ops() as ops:
        attention_motion_flow(q, k, sf=2).square().sum().backward()
    assert any("efficient_attention" in name or "flash_attention" in name for name in ops.names)
    assert not any("math" in name or "softmax" in name for name in ops.names)


def test_tile_flow_looks_at_its_window_only():
    """A far match is found by the dense flow; the tile flow cannot see it from a window elsewhere."""
    q, k = random_features(2, 12, 16, 8)
    found = tile_motion_flow(q, k, sf=2, window=3, tile=(3, 4), tau=1.0)
    k[1, 0, 0] = 100 * q[0, 11, 15]
    again = tile_motion_flow(q, k, sf=2, window=3, tile=(3, 4), tau=1.0, windows=found.windows)
    outside = (found.windows[0] > 0).any(-1)
    assert outside.any()
    tiles = again.flow[1] - found.flow[1]
    unchanged = tiles.unflatten(0, (4, 3)).unflatten(2, (4, 4)).transpose(1, 2).flatten(0, 1)[outside]
    assert unchanged.abs().max() == 0
    assert (attention_motion_flow(q, k, sf=2)[1, 11, 15] + torch.tensor([11.0, 15.0])).abs().max() < 1e-3


def test_windows_lie_around_the_match_and_inside_the_grid():
    x = moving_features(3, 12, 16, (2, 3))
    windows = tile_motion_flow(x, x, sf=3, window=5, tile=(3, 4), tau=60.0).windows
    assert windows.shape == (3, 16, 2)
    assert windows.min() == 0
    assert windows[..., 0].max() <= 12 - 5
    assert windows[..., 1].max() <= 16 - 5
    # The tile in tile row 1, column 1 has its centre at (4, 6), which moves to (6, 9): window from (4, 7) on.
    assert windows[0, 5].tolist() == [4, 7]


def test_windows_of_the_reference_serve_the_generated_side():
    q, k = random_features(3, 9, 12, 6)
    q2, k2 = random_features(3, 9, 12, 6, seed=1)
    reference = tile_motion_flow(q, k, sf=3, window=5, tile=(3, 4))
    reused = tile_motion_flow(q2, k2, sf=3, window=5, tile=(3, 4), windows=reference.windows)
    searched = tile_motion_flow(q2, k2, sf=3, window=5, tile=(3, 4))
    assert torch.equal(reused.windows, reference.windows)
    assert not torch.equal(reused.flow, searched.flow)


@pytest.mark.parametrize("flow", ["dense", "tile"])
def test_chunks_change_nothing_forward_or_backward(flow):
    results = []
    for chunk in (1, 3, 100):
        q, k = (x.requires_grad_() for x in random_features(4, 7, 9, 6))
        if flow == "dense":
            out = attention_motion_flow(q, k, sf=3, chunk=chunk).square().sum()
        else:
            tiled = tile_motion_flow(q, k, sf=3, window=5, tile=(3, 4), chunk=chunk)
            out = tiled.flow.square().sum() + tiled.window_loss
        results.append((out.detach(), *torch.autograd.grad(out, [q, k])))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("flow", ["dense", "tile"])
def test_gradients_are_those_of_finite_differences(flow):
    q, k = (0.5 * x.requires_grad_() for x in random_features(3, 4, 5, 3))
    q, k = (x.detach().requires_grad_() for x in (q, k))
    reference = attention_motion_flow(*random_features(3, 4, 5, 3, seed=2), sf=3)
    windows = tile_motion_flow(q, k, sf=3, window=3, tile=(2, 2)).windows
    weights = pair_weights(frame_pairs(3, 3), 3, (1.0, 0.8), 1.0)

    def loss(q, k):
        if flow == "dense":
            return amf_loss(attention_motion_flow(q, k, sf=3), reference, weights, 10.0)
        tiled = tile_motion_flow(q, k, sf=3, window=3, tile=(2, 2), windows=windows)
        return amf_loss(tiled.flow, reference, weights, 10.0) + tiled.window_loss

    assert torch.autograd.gradcheck(loss, (q, k))


def test_flow_and_loss_do_not_see_a_common_rotation_of_features():
    q, k = random_features(3, 6, 8, 6)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    plain, turned = (
        tile_motion_flow(a, b, sf=3, window=5, tile=(3, 4)) for a, b in ((q, k), (q @ turn, k @ turn))
    )
    torch.testing.assert_close(plain.flow, turned.flow)
    torch.testing.assert_close(plain.window_loss, turned.window_loss)


def test_the_loss_of_a_flow_with_itself_is_zero_with_zero_gradient():
    q, k = (x.requires_grad_() for x in random_features(3, 6, 8, 6))
    reference = tile_motion_flow(q, k, sf=3, window=5, tile=(3, 4))
    again = tile_motion_flow(q, k, sf=3, window=5, tile=(3, 4), windows=reference.windows)
    loss = amf_loss(again.flow, reference.flow.detach(), [1.0] * len(again.pairs), 1560.0)
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, [q, k]))


def test_half_precision_features_are_summed_in_float32():
    q, k = (x.bfloat16() for x in random_features(2, 8, 8, 16))
    flow = attention_motion_flow(q, k, sf=2)
    assert flow.dtype == torch.float32
    torch.testing.assert_close(
        flow, attention_motion_flow(q.double(), k.double(), sf=2).float(), atol=1e-5, rtol=0
    )


def test_the_readings_of_the_head_average():
    q, k = random_features(2, 3, 4, 5, 6)
    logits = torch.einsum("hwnd,uvnd->hwuvn", q[0], k[1]) / math.sqrt(6)
    for heads, wanted in (
        ("mean_logits", logits.mean(-1)),
        ([1, 3], logits[..., [1, 3]].mean(-1)),
        ([2], logits[..., 2]),
    ):
        a, b = reduce_heads(q, k, heads)
        torch.testing.assert_close(torch.einsum("hwd,uvd->hwuv", a[0], b[1]) / math.sqrt(a.shape[-1]), wanted)
    a, b = reduce_heads(q, k, "mean_qk")
    torch.testing.assert_close(a, q.mean(-2))
    torch.testing.assert_close(b, k.mean(-2))


def test_released_capture_equals_the_reference(golden):
    g, _ = golden("dit_tiny")
    for name in ("q", "k"):
        heads = g[f"t0.block_{name}"].reshape(3, 4, 6, 4, 20)
        torch.testing.assert_close(
            average_token_groups(heads), g[f"t0.block_{name}_released"], atol=2e-5, rtol=0
        )


def masked_mse(flow, reference):
    """DiTFlow's loss: mean squared difference over the tokens that move in the reference."""
    moving = (reference != 0).any(-1, keepdim=True)
    squared = ((flow - reference).square() * moving).sum()
    return squared / (2 * moving.sum()).clamp(min=1)


@pytest.mark.parametrize("case", ["a", "b"])
def test_dense_flow_equals_ditflow(golden, case):
    """All F x F pairs, mean of logits over heads; DiTFlow gives (column, row)."""
    g, info = golden("amf_ditflow")
    c = info["cases"][case]
    leaves = [g[f"{case}.{name}_video"].clone().requires_grad_() for name in ("q", "k")]
    q, k = (x.unflatten(1, (c["F"], c["h"], c["w"])).permute(1, 2, 3, 0, 4) for x in leaves)
    pairs = [(i, j) for i in range(c["F"]) for j in range(c["F"])]
    soft = attention_motion_flow(q, k, pairs=pairs, tau=c["temp"], heads="mean_logits")
    hard = attention_motion_flow(q, k, pairs=pairs, heads="mean_logits", hard=True)
    torch.testing.assert_close(soft.flip(-1).flatten(1, 2), g[f"{case}.flow_soft"], atol=1e-5, rtol=0)
    assert torch.equal(hard.flip(-1).flatten(1, 2), g[f"{case}.flow_argmax"])
    loss = masked_mse(soft, hard)
    torch.testing.assert_close(loss, g[f"{case}.masked_mse"], atol=1e-6, rtol=1e-5)
    for name, gradient in zip(("q", "k"), torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(gradient, g[f"{case}.grad_{name}_video"], atol=1e-6, rtol=0)


def test_window_means_and_their_change_are_the_formula():
    _, k = random_features(4, 6, 7, 3)
    pairs = [pair for pair in frame_pairs(4, 3) if pair[0] < pair[1]]
    windows = torch.randint(0, 3, (len(pairs), 5, 2), generator=torch.Generator().manual_seed(0))
    means = window_means(k, pairs, windows, (3, 4))
    for p, (_, j) in enumerate(pairs):
        for t in range(5):
            row, col = windows[p, t].tolist()
            torch.testing.assert_close(means[p, t], k[j, row : row + 3, col : col + 4].mean((0, 1)))
    # Frames 0 and 1 have two later ones, frame 2 has one.
    by_pair = dict(zip(pairs, means, strict=True))
    changes = [(by_pair[i, i + 2] - by_pair[i, i + 1]).norm(dim=-1).mean() for i in (0, 1)]
    torch.testing.assert_close(mean_change(means, pairs), sum(changes) / 2)
    assert mean_change(means[:1], pairs[:1]) == 0


def test_the_weights_of_pairs_fall_with_their_distance():
    assert pair_weights([(0, 0), (0, 1), (0, 2), (1, 1)], 3, (1.0, 0.8), 0.5) == pytest.approx(
        [0.5, 0.9, 0.8, 0.5]
    )


def test_the_amf_loss_keeps_its_scale_at_any_size():
    flow = torch.zeros(2, 30, 52, 2)
    assert amf_loss(flow + 1, flow, [1.0, 1.0], 1560.0) == pytest.approx(2 * 1560)
    assert amf_loss(flow[:, :3, :4] + 1, flow[:, :3, :4], [1.0, 1.0], 1560.0) == pytest.approx(2 * 1560)
    assert amf_loss(flow + 1, flow, [1.0, 0.5], None) == pytest.approx(1.5 * 1560)


def test_fewer_frames_than_sf_use_the_pairs_that_exist():
    q, k = random_features(2, 5, 6, 4)
    assert len(attention_motion_flow(q, k, sf=7)) == 3
    assert frame_pairs(3, 2) == [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2)]


BAD = {
    "window even": ({"window": 4}, "window must be an odd whole number of at least 1; got 4"),
    "window 0": ({"window": -1}, "window must be an odd"),
    "tile": ({"tile": (0, 4)}, r"tile must be two values \(rows, columns\)"),
    "tau": ({"tau": 0.0}, "tau must be a finite number above 0"),
    "sf": ({"sf": 0}, "sf must be a whole number of at least 1"),
    "chunk": ({"chunk": 0}, "chunk must be a whole number of at least 1"),
    "heads": ({"heads": "best"}, "heads must be one of mean_qk, mean_logits"),
    "windows": ({"windows": torch.zeros(1, 2, 2, dtype=torch.long)}, "windows must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    arguments, message = BAD[case]
    q, k = random_features(3, 6, 8, 4)
    with pytest.raises(ValueError, match=message):
        tile_motion_flow(q, k, **arguments)


def test_shapes_that_do_not_fit_are_named():
    q, k = random_features(3, 6, 8, 4)
    with pytest.raises(ValueError, match="q and k must both be"):
        attention_motion_flow(q, k[:2])
    with pytest.raises(ValueError, match=r"pairs must name frames 0\.\.2"):
        attention_motion_flow(q, k, pairs=[(0, 3)])
    with pytest.raises(ValueError, match=r"heads must be in 0\.\.1 for this DiT; got \[5\]"):
        attention_motion_flow(q.unflatten(-1, (2, 2)), k.unflatten(-1, (2, 2)), heads=[5])
    with pytest.raises(ValueError, match=r"flow is .* but its reference is"):
        amf_loss(torch.zeros(1, 2, 2, 2), torch.zeros(2, 2, 2, 2), [1.0], None)
