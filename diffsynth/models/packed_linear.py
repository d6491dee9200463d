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
    """A linear layer with packed weights, and what LoRAs add beside them; no weight gets a gradient.

    Attributes:
        stored: float8_e4m3fn or int8.
        weight: bytes of the packed weights [out, in], int8. scale: [out, 1].
        down, up: factors [rank, in] and [out, rank] of what is added to the weights; None for nothing.
        full: a whole difference [out, in]. own: the share [out] of the layer's own output that is added.
    """

    down: Tensor | None
    up: Tensor | None
    full: Tensor | None
    own: Tensor | None

    def __init__(self, linear: nn.Linear, stored: torch.dtype = FP8) -> None:
        super().__init__()
        packed, scale = pack(linear.weight, stored)
        self.stored = stored
        self.register_buffer("weight", packed)
        self.register_buffer("scale", scale)
        for name in ("down", "up", "full", "own"):
            self.register_buffer(name, None, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        out = _PackedProduct.apply(x, self.weight, self.scale, self.stored)
        if self.own is not None:
            out = out + self.own.to(x.dtype) * out
        if self.full is not None:
            out = out + F.linear(x, self.full.to(x.dtype))
        if self.down is not None and self.up is not None:
            out = out + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return out if self.bias is None else out + self.bias

    def change(self, factors: tuple[Tensor, Tensor] | None, full: Tensor | None, own: Tensor | None) -> None:
        """Set what stands beside the weights; kept in bfloat16, where the weights are."""
        self.down, self.up = (None, None) if factors is None else map(self._beside, factors)
        self.full, self.own = self._beside(full), self._beside(own)

    def fill_up(self, rank: int, *, full: bool, own: bool) -> None:
        """Have what other layers have beside their weights, zeros where this one has none."""
        rows, columns = self.weight.shape
        if rank:
            down = torch.zeros(0, columns) if self.down is None else self.down
            up = torch.zeros(rows, 0) if self.up is None else self.up
            missing = rank - len(down)
            self.down = self._beside(F.pad(down, (0, 0, 0, missing)))
            self.up = self._beside(F.pad(up, (0, missing)))
        if full and self.full is None:
            self.full = self._beside(torch.zeros(rows, columns))
        if own and self.own is None:
            self.own = self._beside(torch.zeros(rows))

    def _beside(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.weight.device, torch.bfloat16)


def pack_block_linears(model: nn.Module, stored: torch.dtype = FP8) -> None:
    """Replace each linear layer of the model's repeated blocks by a `PackedLinear`; the few others stay as
    they are.
    """
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for parent in list(blocks.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child, stored))
