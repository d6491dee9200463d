"""Linear layers whose weights rest in eight bits, float8 or int8, and compute in the dtype of their input.

Weights alone are packed, never what flows between layers: a rounded activation would have no gradient. Each
output row has its own scale. float8: a power of two, so that scaling loses nothing and small weights do not
fall below the range of float8. int8: the row's largest weight is 127, the scale a bfloat16 number, so that no
dtype of the model rounds it. Both keep their bytes as int8, which `module.to(dtype)` leaves alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8, INT8 = torch.float8_e4m3fn, torch.int8
PACKED_DTYPES = (FP8, INT8)
FP8_MAX, INT8_MAX = torch.finfo(FP8).max, 127
SMALLEST_EXPONENT = -24  # of a scale that float16 can still hold


def pack(weight: Tensor, stored: torch.dtype = FP8) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (its bytes as int8 [out, in], scale [out, 1] float32): value * scale.

    Raises ValueError for a dtype that is not one of PACKED_DTYPES.
    """
    if stored not in PACKED_DTYPES:
        raise ValueError(f"stored must be one of {', '.join(map(str, PACKED_DTYPES))}; got {stored}")
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if stored == FP8:
        scale = torch.exp2((largest / FP8_MAX).log2().ceil().clamp_min(SMALLEST_EXPONENT))
        return (weight / scale).to(FP8).view(torch.int8), scale
    # Up by a bfloat16 step of at most 1/128, so that rounding it down does not push a weight past 127.
    scale = (largest / INT8_MAX * (1 + 1 / 128)).clamp_min(2.0**SMALLEST_EXPONENT).bfloat16().float()
    return (weight / scale).round().to(torch.int8), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype, stored: torch.dtype = FP8) -> Tensor:
    """The inverse of `pack`, in `dtype`."""
    return packed.view(stored).to(dtype) * scale.to(dtype)


class _PackedProduct(torch.autograd.Function):
    """x @ weight^T that keeps the packed weight, not its wide copy, for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor, stored: torch.dtype) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.stored = stored
        return F.linear(x, unpack(packed, scale, x.dtype, stored))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ unpack(*ctx.saved_tensors, grad.dtype, ctx.stored), None, None, None


class PackedLinear(nn.Module):
    """A linear layer with packed weights; takes no gradient for them. stored: float8_e4m3fn or int8."""

    def __init__(self, linear: nn.Linear, stored: torch.dtype = FP8) -> None:
        super().__init__()
        packed, scale = pack(linear.weight, stored)
        self.stored = stored
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = _PackedProduct.apply(x, self.weight, self.scale, self.stored)
        return out if self.bias is None else out + self.bias


def pack_block_linears(model: nn.Module, stored: torch.dtype = FP8) -> None:
    """Replace each linear layer of the model's repeated blocks by a `PackedLinear`; the few others stay as
    they are.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for parent in list(blocks.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child, stored))
