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
