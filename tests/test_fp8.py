import torch
from torch import nn

from diffsynth.models.fp8 import Fp8Linear, pack, pack_block_linears, unpack


def test_packing_keeps_weights_of_any_size_to_float8_precision():
    torch.manual_seed(0)
    for size in (1e-3, 0.02, 1.0, 1e4):
        weight = size * torch.randn(32, 64)
        packed, scale = pack(weight)
        assert packed.dtype == torch.int8
        assert torch.equal(scale.log2(), scale.log2().round())
        error = (unpack(packed, scale, torch.float32) - weight).abs()
        # Three bits of mantissa: at most 1/16 off, but for values near the bottom of the range.
        assert (error <= weight.abs() / 16 + weight.abs().amax(1, keepdim=True) * 2**-18).all()


def test_largest_values_do_not_overflow():
    weight = torch.tensor([[448.0, 1.0], [449.0, 1.0], [896.0, -1.0], [0.0, 0.0]])
    restored = unpack(*pack(weight), torch.float32)
    assert restored.isfinite().all()
    torch.testing.assert_close(restored, weight, rtol=0.07, atol=0)


def test_the_gradient_of_the_input_is_that_of_the_unpacked_weight():
    torch.manual_seed(0)
    linear = nn.Linear(16, 8)
    layer = Fp8Linear(linear)
    wide = unpack(layer.weight, layer.scale, torch.float32)
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
