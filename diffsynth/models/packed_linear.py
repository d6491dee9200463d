"""Linear layers whose weights rest in eight bits or less and compute in the dtype of their input.

Weights alone are packed, never what flows between layers: a rounded activation would have no gradient. Each
output row has its own scale. float8: a power of two, so that scaling loses nothing and small weights do not
fall below the range of float8. int8: the row's largest weight is 127, the scale a bfloat16 number, so that no
dtype of the model rounds it. Both keep their bytes as int8, which `module.to(dtype)` leaves alone. Weights
that a file stores in float8 with its own scales, or in a kind of GGUF, are kept as the file has them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffsynth.models.gguf_files import unpack_gguf

FP8, INT8 = torch.float8_e4m3fn, torch.int8
PACKED_DTYPES = (FP8, INT8)
FP8_MAX, INT8_MAX = torch.finfo(FP8).max, 127
SMALLEST_EXPONENT = -24  # of a scale that float16 can still hold


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed matrix [out, in]."""

    data: Tensor  # its bytes as int8, [out, in] or in GGUF [out, n]
    scale: Tensor  # [out, 1], by which the numbers are multiplied; of GGUF, which has its own, [out, 0]
    stored: torch.dtype | str  # of a number, or the kind of GGUF

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix [out, in] in a dtype, rounded once."""
        if isinstance(self.stored, str):
            return unpack_gguf(self.data.view(torch.uint8), self.stored).to(dtype)
        numbers = self.data.view(self.stored)
        if self.scale.dtype == torch.float32:
            return (numbers.float() * self.scale).to(dtype)
        return numbers.to(dtype) * self.scale.to(dtype)


def pack(weight: Tensor, stored: torch.dtype = FP8) -> PackedWeight:
    """Return a matrix [out, in] in eight bits, with bfloat16 scales."""
    if stored not in PACKED_DTYPES:
        raise ValueError(f"stored must be one of {', '.join(map(str, PACKED_DTYPES))}; got {stored}")
    weight = weight.float()
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if stored == FP8:
        scale = torch.exp2((largest / FP8_MAX).log2().ceil().clamp_min(SMALLEST_EXPONENT))
        return PackedWeight((weight / scale).to(FP8).view(torch.int8), scale.bfloat16(), stored)
    # Up by a bfloat16 step of at most 1/128, so that rounding it down does not push a weight past 127.
    scale = (largest / INT8_MAX * (1 + 1 / 128)).clamp_min(2.0**SMALLEST_EXPONENT).bfloat16()
    return PackedWeight((weight / scale.float()).round().to(torch.int8), scale, stored)


class _PackedProduct(torch.autograd.Function):
    """x @ weight^T that keeps the packed weight, not its wide copy, for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor, stored: torch.dtype | str) -> Tensor:
        ctx.save_for_backward(packed, scale)
        ctx.stored = stored
        return F.linear(x, PackedWeight(packed, scale, stored).unpack(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        packed, scale = ctx.saved_tensors
        return grad @ PackedWeight(packed, scale, ctx.stored).unpack(grad.dtype), None, None, None


class PackedLinear(nn.Module):
    """A linear layer with packed weights, and what LoRAs add beside them; no weight gets a gradient."""

    weight: Tensor  # those of its `PackedWeight`, as is `stored`
    scale: Tensor
    down: Tensor | None  # factors [rank, in] and [out, rank] of what is added to the weights
    up: Tensor | None
    full: Tensor | None  # a whole difference [out, in]
    own: Tensor | None  # the share [out] of the layer's own output that is added

    def __init__(self, packed: PackedWeight, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.stored = packed.stored
        self.register_buffer("weight", packed.data)
        self.register_buffer("scale", packed.scale)
        for name in ("down", "up", "full", "own"):
            self.register_buffer(name, None)
        self.bias = linear.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Keep the scale in its dtype, whatever the model's becomes."""
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: x [..., in] -> [..., out]."""
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

    def _beside(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self.weight.device, torch.bfloat16)


class Model(nn.Module):
    """A model of a pipeline: its place is that of its first weight, which is never packed."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that it computes in; linear layers may be stored in another one."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.parameters()).device


def block_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield path, parent and name in the parent of the linear layers of repeated blocks, a model's bulk."""
    paths = {module: path for path, module in model.named_modules()}
    for blocks in [module for module in model.modules() if isinstance(module, nn.ModuleList)]:
        for parent in list(blocks.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    yield f"{paths[parent]}.{name}", parent, name


def pack_block_linears(model: nn.Module, stored: torch.dtype = FP8) -> None:
    """Replace these linear layers by packed ones; the few others stay as they are."""
    for _, parent, name in block_linears(model):
        linear = getattr(parent, name)
        setattr(parent, name, PackedLinear(pack(linear.weight, stored), linear))
