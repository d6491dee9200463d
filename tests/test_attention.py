import pytest
import torch

from diffsynth.models import attention as attention_module
from diffsynth.models.attention import AttentionBackend, attention, use_attention


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, length, 3, 8, dtype=torch.float64) for length in (5, 7, 7))


@pytest.fixture
def forward_only(monkeypatch):
    """Register a stand-in for a kernel without a backward pass that returns zeros."""
    backend = AttentionBackend(run=lambda q, *_: torch.zeros_like(q), differentiable=False)
    monkeypatch.setitem(attention_module.BACKENDS, "forward_only", backend)
    attention_module._resolve.cache_clear()
    yield
    attention_module._resolve.cache_clear()


def test_attention_is_the_textbook_formula(qkv):
    q, k, v = qkv
    weights = torch.einsum("bsnd,blnd->bnsl", q, k).div(8**0.5).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bnsl,blnd->bsnd", weights, v))


@pytest.mark.usefixtures("forward_only")
def test_a_forward_only_backend_is_never_used_where_a_gradient_is_needed(qkv):
    q, k, v = qkv
    assert attention(q, k, v, backend="forward_only").abs().max() == 0
    out = attention(q.requires_grad_(), k, v, backend="forward_only")
    assert out.abs().max() > 0
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        assert attention(q, k, v, backend="forward_only").abs().max() == 0


@pytest.mark.usefixtures("forward_only")
def test_argument_beats_context_beats_environment(qkv, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_ATTENTION", "forward_only")
    assert attention(*qkv).abs().max() == 0
    with use_attention("sdpa"):
        assert attention(*qkv).abs().max() > 0
        assert attention(*qkv, backend="forward_only").abs().max() == 0
    assert attention(*qkv).abs().max() == 0


def test_a_missing_backend_is_refused_with_its_remedy(qkv):
    with pytest.raises(ValueError, match=r"'flash_attn_2' cannot be used.*pip install flash-attn"):
        attention(*qkv, backend="flash_attn_2")


def test_an_unknown_backend_is_refused_with_the_known_names(qkv):
    with pytest.raises(
        ValueError, match=r"'xformers' is unknown; known: flash_attn_3, flash_attn_2, sdpa, sage"
    ):
        attention(*qkv, backend="xformers")
    with pytest.raises(ValueError, match="unknown"), use_attention("nonsense"):
        pass


def broken(*_):
    raise ImportError("undefined symbol: _ZN3c104cuda9SetDevice")


def without_backward(q, *_):
    return torch.ones_like(q).requires_grad_(q.requires_grad)  # no path to the inputs


@pytest.fixture
def installed(monkeypatch):
    """Register a function as the kernel of a package that is installed, in the first place."""

    def register(run, **facts):
        backend = AttentionBackend(run=run, module="json", install="", **facts)
        monkeypatch.setattr(attention_module, "BACKENDS", {"new": backend, **attention_module.BACKENDS})
        attention_module._resolve.cache_clear()

    yield register
    attention_module._resolve.cache_clear()
    attention_module._trial.cache_clear()


def test_a_package_that_fails_when_it_is_called_is_told_once_and_passed_over(qkv, installed, caplog):
    installed(broken)
    expected = attention(*qkv, backend="sdpa")
    for _ in range(3):
        assert torch.equal(attention(*qkv), expected)
    told = [record.message for record in caplog.records if "ImportError: undefined symbol" in record.message]
    assert len(told) == 1
    with pytest.raises(ValueError, match="'new' cannot be used: fails: ImportError: undefined symbol"):
        attention(*qkv, backend="new")
    refusal = attention_module.BACKENDS["new"].refusal("cpu", torch.float32, 8, needs_grad=False)
    assert refusal.startswith("fails: ImportError")  # what `fastvmt doctor` prints


def test_a_kernel_is_tried_with_its_backward_where_a_gradient_is_needed(qkv, installed):
    installed(without_backward)
    q, k, v = qkv
    assert attention(q, k, v).eq(1).all()
    out = attention(q.requires_grad_(), k, v)
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 5), "sdpa"), ((8, 0), "flash_attn_2"), ((8, 9), "flash_attn_2"), ((9, 0), "flash_attn_3"),
     ((10, 0), "sdpa"), ((12, 0), "sdpa")],
)  # fmt: skip
def test_the_order_of_kernels_is_that_of_the_card(monkeypatch, capability, expected):
    monkeypatch.setattr(attention_module, "capability", lambda _: capability)

    def trial(backend, *_):
        """What the packages' own kernels are made for."""
        third = backend is attention_module.BACKENDS["flash_attn_3"]
        return None if (capability[0] == 9 if third else capability >= (8, 0)) else "fails: RuntimeError"

    monkeypatch.setattr(attention_module, "_trial", trial)
    monkeypatch.setattr(attention_module.importlib.util, "find_spec", lambda _: True)
    attention_module._resolve.cache_clear()
    chosen = attention_module._resolve(None, "cuda", torch.bfloat16, 128, True)
    attention_module._resolve.cache_clear()
    assert chosen is attention_module.BACKENDS[expected]
