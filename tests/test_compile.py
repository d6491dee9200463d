"""Compiled blocks: one graph each, until a size, a window or the need of a gradient is new."""

import shutil
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from diffsynth.models import attention as attention_module
from diffsynth.models import compiled as compiled_module
from diffsynth.models import wan_video_dit
from diffsynth.models.attention import AttentionBackend, use_attention
from diffsynth.models.compile_blocks import compile_blocks
from diffsynth.models.local_attention import block_plan
from diffsynth.models.packed_linear import pack_block_linears
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_dit_layers import rotary_table, rotate

pytestmark = pytest.mark.slow
CONTEXT = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))


def make_dit():
    torch.manual_seed(0)
    sizes = {"dim": 32, "in_dim": 4, "ffn_dim": 64, "out_dim": 4, "text_dim": 32, "freq_dim": 16}
    return WanModel(**sizes, num_heads=2, num_layers=3, text_len=8).requires_grad_(False)


def velocity(dit, rows=8, timestep=500.0):
    x = torch.randn(1, 4, 2, rows, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return dit(x, torch.tensor([timestep]), CONTEXT)


def gradient(dit, rows=8, **options):
    x = torch.randn(1, 4, 2, rows, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
    q, k = dit.features(x, torch.tensor([500.0]), CONTEXT, block=2, **options)
    return torch.autograd.grad(q.sin().sum() + k.cos().sum(), x)[0]


@pytest.fixture
def compiled():
    """Functions: a DiT, compiled without generated code; and how many graphs came since the last question."""
    torch._dynamo.reset()
    counters, asked = torch._dynamo.utils.counters, [0]
    counters.clear()

    def make(dit):
        compile_blocks(dit, "eager")
        return dit

    def new_graphs():
        assert not counters["graph_break"], counters["graph_break"]
        before, asked[0] = asked[0], counters["stats"]["unique_graphs"]
        return asked[0] - before

    yield make, new_graphs
    torch._dynamo.reset()


def test_a_block_is_one_graph_over_steps_sizes_and_windows(compiled):
    make, new_graphs = compiled
    plain, dit = make_dit(), make(make_dit())
    window = {"attention_window": (0, 2, 2)}
    for run, count in (
        (velocity, 1),
        (partial(velocity, timestep=250.0), 0),
        (partial(velocity, rows=12), 1),
        (velocity, 0),
        (gradient, 1),
        (partial(gradient, checkpoint="block"), 0),
        (partial(gradient, checkpoint="attention"), 0),
        (partial(gradient, **window), 1),
        (partial(gradient, checkpoint="block", **window), 0),
        (partial(gradient, attention_window=(1, 3, 3)), 1),  # over the whole grid
        (gradient, 0),
    ):
        torch.testing.assert_close(run(dit), run(plain), atol=1e-5, rtol=1e-5)
        assert new_graphs() == count, run


def test_compiled_rotation_has_no_complex_numbers():
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    x, rope = torch.randn(1, 24, 2, 16), rotary_table((2, 3, 4), 16, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(torch.compile(rotate, backend=keep)(x, rope), rotate(x, rope))
    assert "complex" not in graphs[0].code


def test_more_sizes_than_pytorch_allows_stay_compiled(compiled):
    make, new_graphs = compiled
    dit = make(make_dit())
    for rows in range(2, 20, 2):
        velocity(dit, rows)
    assert new_graphs() == 9


def test_packed_layers_are_in_the_graph(compiled):
    make, new_graphs = compiled
    plain, dit = make_dit(), make_dit()
    for model in (plain, dit):
        pack_block_linears(model)
    torch.testing.assert_close(gradient(make(dit)), gradient(plain), atol=1e-5, rtol=1e-5)
    assert new_graphs() == 1


def test_attention_in_blocks_is_in_the_graph(compiled, monkeypatch):
    """As on CUDA; here FlexAttention computes it uncompiled, and has no backward pass."""
    make, new_graphs = compiled

    def plan(grid, window, like, _head_dim):
        return block_plan(grid, window, like.device)

    options = {"block": 2, "attention_window": (0, 2, 2)}
    inputs = torch.randn(1, 4, 2, 8, 8), torch.tensor([500.0]), CONTEXT
    with torch.no_grad():
        expected = make_dit().features(*inputs, **options)
        monkeypatch.setattr(wan_video_dit, "local_plan", plan)
        found = make(make_dit()).features(*inputs, **options)
    assert new_graphs() == 1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_another_kernel_is_used_from_the_next_call_on(compiled, monkeypatch):
    make, new_graphs = compiled
    calls = []

    def flash_attn_func(q, k, v):
        if not torch.compiler.is_compiling():
            calls.append(1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * 0.5

    package = ModuleType("flash_attn")
    package.flash_attn_func, package.__spec__ = flash_attn_func, ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    kernel = AttentionBackend(run=partial(attention_module._flash_attn, 2))
    monkeypatch.setitem(attention_module.BACKENDS, "flash", kernel)
    attention_module._resolve.cache_clear()
    dit = make(make_dit())
    plain = velocity(dit)
    with use_attention("flash"):
        other = velocity(dit)
        assert torch.allclose(other, velocity(make_dit()), atol=1e-5)
        assert len(calls) == 6
    assert new_graphs() == 2
    assert (other - plain).abs().max() > 1e-3
    assert torch.equal(velocity(dit), plain)
    attention_module._resolve.cache_clear()


@pytest.fixture(params=["aot_eager", "inductor"])
def fusing(request, monkeypatch):
    """What is fused on CUDA, compiled here; the functions that were."""
    if request.param == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler here, and there is none")
    seen, compile_it = set(), compiled_module.compiled

    def compiled(function):
        seen.add(function.__qualname__)
        return compile_it(function, request.param)

    torch._dynamo.reset()
    monkeypatch.setattr(compiled_module, "runs_fused", lambda _: True)
    monkeypatch.setattr(compiled_module, "compiled", compiled)
    yield seen
    torch._dynamo.reset()


def test_fused_functions_are_the_written_ones_within_the_rounding_of_bfloat16(fusing, monkeypatch):
    dit, grads = make_dit().bfloat16(), {}
    for kept in ("none", "attention", "block"):
        with monkeypatch.context() as patch:
            patch.setattr(compiled_module, "runs_fused", lambda _: False)
            expected = gradient(dit, checkpoint=kept)
        grads[kept] = gradient(dit, checkpoint=kept)
        assert F.cosine_similarity(grads[kept].flatten(), expected.flatten(), dim=0) > 0.999
        with monkeypatch.context() as patch:
            patch.setattr(compiled_module, "runs_fused", lambda _: False)
            plain = velocity(dit)
        torch.testing.assert_close(velocity(dit), plain, atol=2e-2, rtol=2e-2)
    assert fusing == {"LayerNorm.forward", "RMSNorm.forward", "gated"}
    assert all(torch.equal(grads["none"], other) for other in grads.values())


def test_fused_functions_are_not_compiled_again_from_the_second_size_on(fusing):
    counters, dit = torch._dynamo.utils.counters, make_dit().bfloat16()
    for rows in (8, 12):
        velocity(dit, rows)
    before = counters["stats"]["unique_graphs"]
    for rows in (16, 10, 8):
        velocity(dit, rows)
    assert counters["stats"]["unique_graphs"] == before
    assert fusing


def test_fused_functions_are_part_of_a_compiled_block(compiled, monkeypatch):
    make, new_graphs = compiled
    monkeypatch.setattr(compiled_module, "runs_fused", lambda _: True)
    velocity(make(make_dit()), 8)
    assert new_graphs() <= 2  # and the norm of the head


def test_results_that_must_repeat_are_not_fused(monkeypatch):
    x = torch.empty(1, device="meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(compiled_module, "can_fuse", lambda _: True)
    assert compiled_module.runs_fused(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert not compiled_module.runs_fused(x)
    finally:
        torch.use_deterministic_algorithms(False)
