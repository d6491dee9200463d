"""Linear layers whose weights rest in float8 and compute in the dtype of their input.

Each output row has its own scale, a power of two, so that scaling loses nothing and small weights do not
fall below the range of float8. The bytes are kept as int8 so that `module.to(dtype)` leaves them alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SMALLEST_EXPONENT = -24  # of a scale that float16 can still hold


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] -> (float8 bytes as int8 [out, in], scale [out, 1] float32): float8 * scale."""
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2((largest / FP8_MAX).log2().ceil().clamp_min(SMALLEST_EXPONENT))
    return (weight / scale).to(FP8).view(torch.int8), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack`, in `dtype`."""
    return packed.view(FP8).to(dtype) * scale.to(dtype)


class _Fp8Product(torch.autograd.Function):
    """x @ weight^T that keeps the packed weight, not its wide copy, for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(packed, scale)
        return F.linear(x, unpack(packed, scale, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ unpack(*ctx.saved_tensors, grad.dtype), None, None


class Fp8Linear(nn.Module):
    """A linear layer with packed weights; takes no gradient for them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        packed, scale = pack(linear.weight)
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = _Fp8Product.apply(x, self.weight, self.scale)
        return out if self.bias is None else out + self.bias


def pack_block_linears(model: nn.Module) -> None:
    """Replace each linear layer of the model's repeated blocks by an `Fp8Linear`; the few others stay as
    they are.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for parent in list(blocks.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Fp8Linear(child))
