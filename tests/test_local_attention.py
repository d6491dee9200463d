"""Attention to a neighbourhood of tokens: against masked dense attention, and what it costs."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffsynth.models.attention import attention
from diffsynth.models.local_attention import (
    BLOCK,
    LEAST_TILE,
    attend_in_blocks,
    attend_in_tiles,
    block_plan,
    local_attention,
    tile_plan,
)
from diffsynth.models.wan_video_dit import WanModel

CPU = torch.device("cpu")
# Whole tiles, partial tiles, a border that reaches into the second tile, windows wider than an axis.
CASES = {
    "inside": ((3, 24, 24), (1, 3, 2)),
    "partial tiles": ((4, 13, 19), (2, 5, 9)),
    "one token": ((2, 9, 10), (0, 0, 0)),
    "all frames": ((3, 17, 9), (5, 2, 3)),
    "rows alone": ((2, 20, 11), (1, 1, 40)),
}


def inputs(grid, dtype=torch.float32, batch=2, heads=1, width=16):
    tokens = grid[0] * grid[1] * grid[2]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, tokens, heads, width, dtype=dtype, generator=generator).unbind(0)


def near(grid, window):
    """Which token sees which, [S, S], from the definition."""
    at = torch.stack(torch.unravel_index(torch.arange(grid[0] * grid[1] * grid[2]), grid), dim=-1)
    return ((at[:, None] - at).abs() <= torch.tensor(window)).all(-1)


def masked(q, k, v, grid, window):
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=near(grid, window)).transpose(1, 2)


@pytest.mark.parametrize("case", CASES)
def test_tiles_give_masked_dense_attention_and_its_gradients(case):
    grid, window = CASES[case]
    leaves = [x.requires_grad_() for x in inputs(grid)]
    out, expected = local_attention(*leaves, grid=grid, window=window), masked(*leaves, grid, window)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for found, wanted in zip(
        torch.autograd.grad((out * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_a_window_over_everything_is_dense_attention():
    grid, window = (2, 9, 12), (1, 8, 11)
    q, k, v = inputs(grid)
    assert torch.equal(local_attention(q, k, v, grid=grid, window=window), attention(q, k, v))
    plan = tile_plan(grid, window, CPU)
    assert [group.mask for group in plan.groups] == [None]
    torch.testing.assert_close(attend_in_tiles(q, k, v, plan), attention(q, k, v), atol=1e-5, rtol=0)


def test_the_gradient_is_right_in_float64():
    grid, window = (1, 9, 3), (0, 1, 1)
    leaves = [x.requires_grad_() for x in inputs(grid, torch.float64, batch=1, heads=1, width=2)]
    assert len(tile_plan(grid, window, CPU).groups) > 1
    assert torch.autograd.gradcheck(lambda *x: local_attention(*x, grid=grid, window=window), leaves)


@pytest.mark.parametrize("case", CASES)
def test_every_token_asks_once(case):
    grid, window = CASES[case]
    plan = tile_plan(grid, window, CPU)
    torch.testing.assert_close(plan.queries.sort().values, torch.arange(grid[0] * grid[1] * grid[2]))
    torch.testing.assert_close(plan.queries[plan.positions], torch.arange(len(plan.queries)))


def test_tiles_alike_share_a_mask_and_the_plan_is_kept():
    small, large = (tile_plan((6, 24, cols), (1, 2, 3), CPU) for cols in (32, 64))
    # The first, the last and those between, on each of three axes.
    assert len(small.groups) == len(large.groups) == 3**3
    assert max(len(group.queries) for group in large.groups) == 4 * 1 * 6
    assert tile_plan((6, 24, 64), (1, 2, 3), CPU) is large


def flops(grid, window, backward=False):
    """Operations of the matrix multiplications that attention of this grid is made of; none is run."""
    shape = (1, grid[0] * grid[1] * grid[2], 1, 4)
    leaves = [torch.empty(shape, device="meta", requires_grad=backward) for _ in range(3)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = local_attention(*leaves, grid=grid, window=window)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


def test_cost_grows_linearly_with_tokens():
    window = (1, 1, 1)
    grids = [(8, 24, 32), (8, 24, 64), (8, 48, 64), (16, 48, 64)]
    tokens = [f * h * w for f, h, w in grids]
    assert [n // tokens[0] for n in tokens] == [1, 2, 4, 8]
    counts = [flops(grid, window) for grid in grids]
    for n, count in zip(tokens, counts, strict=True):
        assert count / counts[0] == pytest.approx(n / tokens[0], rel=0.15)
    # Dense attention multiplies each query with each key, twice.
    assert flops((2, 8, 16), (1, 7, 15)) == 2 * 2 * (2 * 8 * 16) ** 2 * 4
    # A tile of 1 x 8 x 8 queries inside sees 3 x 10 x 10 keys.
    assert LEAST_TILE == (1, 8, 8)
    assert counts[-1] < 2 * 2 * 4 * tokens[-1] * 300


def test_the_backward_pass_grows_linearly_too():
    first, second = (flops((3, 24, cols), (1, 2, 2), backward=True) for cols in (32, 64))
    assert second / first == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("case", CASES)
def test_the_blocks_listed_hold_all_that_is_near_and_whole_ones_nothing_else(case):
    grid, window = CASES[case]
    plan = block_plan(grid, window, CPU)
    tokens = grid[0] * grid[1] * grid[2]
    assert len(plan.order) % BLOCK == 0
    torch.testing.assert_close(plan.order[plan.positions], torch.arange(tokens))
    seen = torch.zeros(len(plan.order), len(plan.order), dtype=torch.bool)
    seen[:tokens, :tokens] = near(grid, window)[plan.order[:tokens]][:, plan.order[:tokens]]
    seen[tokens:, tokens:] = True
    blocks = seen.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    mask = plan.mask
    lists = [
        (mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices),
    ]  # fmt: skip
    partial, whole = torch.zeros(2, *blocks.shape[:2], dtype=torch.bool)
    for listed, (counts, indices) in zip((partial, whole), lists, strict=True):
        for row, (count, index) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            listed[row, index[:count].long()] = True
    assert not (partial & whole).any()
    assert (partial | whole)[blocks.any(-1)].all()
    assert blocks[whole].all()


def test_blocks_of_a_large_grid_are_few():
    """Of the 256 x 256 blocks of 480x832 and 81 frames, window (2, 6, 6)."""
    plan = block_plan((21, 30, 52), (2, 6, 6), CPU)
    computed = (plan.mask.kv_num_blocks + plan.mask.full_kv_num_blocks).sum().item()
    assert computed / 256**2 < 0.15


@pytest.mark.parametrize("case", ["partial tiles", "all frames"])
def test_flex_attention_gives_the_same_as_tiles(case):
    """Uncompiled it takes the rule of which token sees which, not the list of blocks."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    grid, window = CASES[case]
    q, k, v = inputs(grid)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = attend_in_blocks(q, k, v, block_plan(grid, window, CPU), flex)
    torch.testing.assert_close(out, local_attention(q, k, v, grid=grid, window=window), atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_flex_attention_gives_the_gradients_of_tiles_on_a_gpu(case):
    grid, window = CASES[case]
    device = torch.device(torch.accelerator.current_accelerator())
    leaves = [x.to(device).requires_grad_() for x in inputs(grid)]
    tiled = attend_in_tiles(*leaves, tile_plan(grid, window, device))
    flex = local_attention(*leaves, grid=grid, window=window)
    torch.testing.assert_close(flex, tiled, atol=1e-3, rtol=1e-3)
    weights = torch.randn_like(flex)
    for found, wanted in zip(
        torch.autograd.grad((flex * weights).sum(), leaves),
        torch.autograd.grad((tiled * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, atol=5e-3, rtol=5e-3)


def make_dit(num_layers=3):
    torch.manual_seed(0)
    return WanModel(
        dim=24, in_dim=4, ffn_dim=24, out_dim=4, text_dim=8, freq_dim=16, num_heads=2, num_layers=num_layers,
        text_len=4,
    )  # fmt: skip


def features(dit, block, x, **options):
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(1, 4, 8, generator=generator)
    return dit.features(x, torch.tensor([500.0]), context, block=block, **options)


@pytest.mark.parametrize("checkpoint", ["none", "block", "attention"])
def test_features_through_a_window_over_everything_are_those_without(checkpoint):
    dit = make_dit()
    x = torch.randn(1, 4, 3, 20, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    dense = features(dit, 2, x)
    local = features(dit, 2, x, attention_window=(3, 10, 12), checkpoint=checkpoint)
    for found, wanted in zip(local, dense, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(q.square().sum() + k.sum(), x)[0] for q, k in (local, dense)]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_a_window_of_the_features_bounds_what_a_token_depends_on():
    """Through one block; the block that is read is asked for its queries and keys alone."""
    dit = make_dit()
    x = torch.randn(1, 4, 3, 20, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    q, _ = features(dit, 1, x, attention_window=(1, 2, 3))
    (gradient,) = torch.autograd.grad(q[0, 0, 5, 6].sum(), x)
    reached = gradient[0].abs().sum(0).unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).sum((2, 4)) > 0
    expected = torch.zeros(3, 10, 12, dtype=torch.bool)
    expected[:2, 3:8, 3:10] = True
    assert torch.equal(reached, expected)
    dense = features(dit, 0, x)
    assert all(map(torch.equal, dense, features(dit, 0, x, attention_window=(0, 0, 0))))


@pytest.mark.parametrize("window", [(1, 2), (1, 2, -1), (1, 2, 0.5), (True, 1, 1), 3])
def test_windows_that_are_not_allowed_are_named(window):
    q, k, v = inputs((1, 2, 2))
    with pytest.raises(ValueError, match=r"attention_window must be three values \(frames, rows, columns\)"):
        local_attention(q, k, v, grid=(1, 2, 2), window=window)


def test_a_grid_of_other_tokens_is_named():
    q, k, v = inputs((1, 2, 2))
    with pytest.raises(ValueError, match=r"S tokens of the grid \(1, 2, 3\); got \(2, 4, 1, 16\)"):
        local_attention(q, k, v, grid=(1, 2, 3), window=(0, 0, 0))
