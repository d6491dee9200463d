import pytest
import torch
from torch import nn

from diffsynth.models.packed_linear import PACKED_DTYPES, PackedLinear, pack, pack_block_linears


def test_packing_keeps_weights_of_any_size_to_float8_precision():
    torch.manual_seed(0)
    for size in (1e-3, 0.02, 1.0, 1e4):
        weight = size * torch.randn(32, 64)
        packed = pack(weight)
        assert packed.data.dtype == torch.int8
        assert torch.equal(packed.scale.log2(), packed.scale.log2().round())
        error = (packed.unpack() - weight).abs()
        # Three bits of mantissa: at most 1/16 off, but for values near the bottom of the range.
        assert (error <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) * 2**-18).all()


def test_largest_values_do_not_overflow():
    weight = torch.tensor([[448.0, 1.0], [449.0, 1.0], [896.0, -1.0], [0.0, 0.0]])
    restored = pack(weight).unpack()
    assert restored.isfinite().all()
    torch.testing.assert_close(restored, weight, rtol=0.07, atol=0)


def test_int8_keeps_weights_to_half_a_step_in_any_dtype_of_the_model():
    torch.manual_seed(0)
    for size in (1e-3, 0.02, 1.0, 1e4):
        weight = size * torch.randn(32, 64)
        packed = pack(weight, torch.int8)
        assert packed.data.abs().amax(1).min() >= 125
        assert packed.scale.dtype == torch.bfloat16
        error = (packed.unpack() - weight).abs()
        assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()
    assert pack(torch.zeros(2, 3), torch.int8).unpack().abs().max() == 0
    with pytest.raises(ValueError, match=r"stored must be one of torch\.float8_e4m3fn, torch\.int8; got"):
        pack(weight, torch.int4)


@pytest.mark.parametrize("stored", PACKED_DTYPES)
def test_the_backward_pass_keeps_packed_weights(stored):
    linear, kept = nn.Linear(16, 8), []
    layer = PackedLinear(pack(linear.weight, stored), linear)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, 16, requires_grad=True))
    assert sorted(t.nbytes for t in kept) == [8 * 2, 8 * 16]


@pytest.mark.parametrize("stored", PACKED_DTYPES)
def test_the_gradient_of_the_input_is_that_of_the_unpacked_weight(stored):
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    packed = pack(linear.weight, stored)
    layer, wide = PackedLinear(packed, linear), packed.unpack()
    x = torch.randn(3, 16, requires_grad=True)
    torch.testing.assert_close(layer(x), x @ wide.T + linear.bias)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, 2 * (x @ wide.T + linear.bias) @ wide)


def test_changing_the_dtype_of_a_model_leaves_packed_weights_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]))
    pack_block_linears(model)
    before = model[1][0].weight.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model[1][0].weight, before)
    assert (model[0].weight.dtype, model[1][1].weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert model[1][0](torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
