"""GGUF files, as city96's converter and llama.cpp write them.

The DiT has its own names there, UMT5 those of llama.cpp.
Reading needs the `gguf` package; numbers are unpacked here, on the device where they are needed. Every block
of weights, in a row of a matrix, has its own scale d, and in some kinds a minimum m. Axes: n blocks.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.models.names import NAMES

# llama.cpp's names of UMT5's encoder, as transformers' names.
_T5_TOP, _T5_BLOCK = NAMES["gguf_text_encoder"]["tensors"], NAMES["gguf_text_encoder"]["block"]
WIDE_KINDS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of tensors with more axes than GGUF has


def read_gguf(file: Path) -> dict[str, tuple[Tensor, str, torch.Size]]:
    """Return the tensors of a GGUF file: their bytes [rows, n] uint8, mapped, their kind, and their shape.

    Raises:
        ImportError: the gguf package is missing.
        ValueError: the file is damaged, or has a tensor of a kind that is not supported.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError(f"{file} is a GGUF file; to read it, pip install gguf") from error
    try:
        reader = GGUFReader(file, "c")  # pages that are written to are copied; none is
    except (ValueError, KeyError, IndexError, OverflowError) as error:
        raise ValueError(f"{file} is truncated or not a GGUF file ({error}); fetch it again") from error
    found = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind not in (*WIDE_KINDS, *UNPACK):
            known = ", ".join((*WIDE_KINDS, *UNPACK))
            raise ValueError(f"{file}: {tensor.name} is of kind {kind}; supported are {known}")
        original = reader.fields.get(_ORIGINAL_SHAPE + tensor.name)
        shape = [int(side) for side in reversed(tensor.shape)]
        if original is not None:
            shape = [int(original.parts[part][0]) for part in original.data]
        name, block = tensor.name, re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block and block[2] in _T5_BLOCK:
            name = f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}.weight"
        data = torch.from_numpy(tensor.data).view(torch.uint8).reshape(shape[0], -1)
        found[_T5_TOP.get(name, name)] = data, kind, torch.Size(shape)
    return found


def unpack_gguf(data: Tensor, kind: str, shape: Sequence[int] | None = None) -> Tensor:
    """Return the numbers of a tensor, float32, from its bytes [rows, n] uint8; [rows, columns] by default."""
    if kind in WIDE_KINDS:
        numbers = data.contiguous().view(WIDE_KINDS[kind]).float()
    else:
        size, unpack = UNPACK[kind]
        numbers = unpack(data.reshape(-1, size))
    return numbers.reshape(shape or (len(data), -1))


def _halves(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 number at a byte of each block, [n, 1] float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """Return the low halves of bytes, then the high ones: [..., b] -> [..., 2, b]."""
    return torch.stack([packed & 15, packed >> 4], dim=-2)


def _bits(packed: Tensor, count: int) -> Tensor:
    """Return the bits of bytes, lowest first: [..., b] -> [..., b, count]."""
    return packed[..., None] >> torch.arange(count, device=packed.device, dtype=torch.uint8) & 1


def _five_bits(blocks: Tensor, start: int) -> Tensor:
    """Return the numbers of blocks whose high bits, four bytes from `start` on, stand before the low ones."""
    high = _bits(blocks[:, start : start + 4], 8).flatten(1)
    return _nibbles(blocks[:, start + 4 :]).flatten(1) | high << 4


def _groups(blocks: Tensor, start: int, high_bits: Tensor | int = 0) -> Tensor:
    """Return d scale n - m minimum, [n, 8, 32]: twelve bytes hold eight scales and minima of six bits.

    The low bits of the numbers are the bytes from `start` on.
    """
    numbers = _nibbles(blocks[:, start:].unflatten(1, (4, 32))).flatten(1, 2) | high_bits
    low, middle, high = blocks[:, 4:16].split(4, dim=1)
    scales = torch.cat([low & 63, high & 15 | low >> 6 << 4], dim=1)[..., None]
    minima = torch.cat([middle & 63, high >> 4 | middle >> 6 << 4], dim=1)[..., None]
    return _halves(blocks, 0)[..., None] * scales * numbers - _halves(blocks, 2)[..., None] * minima


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64))).reshape(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)[:, None]
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3
    numbers = ((low | high << 4).float() - 32).reshape(-1, 16, 16)
    return _halves(blocks, 208)[..., None] * blocks[:, 192:208].view(torch.int8)[..., None] * numbers


# Bytes of a block of each kind, and its numbers.
UNPACK: Mapping[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "Q8_0": (34, lambda blocks: _halves(blocks, 0) * blocks[:, 2:].view(torch.int8)),
    "Q4_0": (18, lambda blocks: _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).flatten(1).float() - 8)),
    "Q4_1": (20, lambda blocks: _halves(blocks, 0) * _nibbles(blocks[:, 4:]).flatten(1) + _halves(blocks, 2)),
    "Q5_0": (22, lambda blocks: _halves(blocks, 0) * (_five_bits(blocks, 2).float() - 16)),
    "Q5_1": (24, lambda blocks: _halves(blocks, 0) * _five_bits(blocks, 4) + _halves(blocks, 2)),
    "Q4_K": (144, lambda blocks: _groups(blocks, 16)),
    "Q5_K": (176, lambda blocks: _groups(blocks, 48, _bits(blocks[:, 16:48], 8).mT << 4)),
    "Q6_K": (210, _q6_k),
}
