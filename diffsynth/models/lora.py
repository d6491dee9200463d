"""Add LoRAs to the layers of the DiT, summed in float32.

Wide weights are set to the stored ones plus all changes. Packed weights stay as they are, as packing anew
would round a small change away: the changes stand beside them (`PackedLinear.change`).
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn

from diffsynth.models.checkpoint_files import StoredTensor
from diffsynth.models.lora_files import LayerParts, Lora
from diffsynth.models.packed_linear import PackedLinear

Change = tuple[float, LayerParts]  # the caller's strength, and what a file holds for a layer
Factors = tuple[Tensor, Tensor]  # down [rank, columns] and up [rows, rank], float32


def merge(
    dit: nn.Module, base: Mapping[str, StoredTensor], loras: Iterable[Lora], layers: Iterable[str]
) -> None:
    """Set the named layers of the DiT to their stored weights plus what the LoRAs add.

    Starting from the file each time makes removal exact and keeps rounding from piling up.
    """
    loras = list(loras)
    for name in layers:
        module = dit.get_submodule(name)
        changes = [(lora.alpha, lora.layers[name]) for lora in loras if name in lora.layers]
        if isinstance(module, PackedLinear):
            module.change(*_beside(base[f"{name}.weight"].read().float(), changes))
        elif f"{name}.weight" in base:
            weight = base[f"{name}.weight"].read().float()
            added = [strength * weight_change(parts, weight) for strength, parts in changes]
            own = cast(Tensor, module.weight)
            own.data = sum(added, weight).to(own)
        for tensor, parts_of in (("bias", ("diff_b", "up_bias")), ("modulation", ("diff_m",))):
            if f"{name}.{tensor}" in base and getattr(module, tensor, None) is not None:
                value = base[f"{name}.{tensor}"].read().float()
                for strength, parts in changes:
                    for part in parts_of:
                        if part in parts.stored:
                            scale = parts.scale if part == "up_bias" else 1.0
                            value = value + strength * scale * _read(parts, part).reshape(value.shape)
                getattr(module, tensor).data = value.to(getattr(module, tensor))
    _level(dit)


def weight_change(parts: LayerParts, weight: Tensor) -> Tensor:
    """Return what a file adds to a weight [rows, ...] at strength 1, float32.

    DoRA (arXiv 2402.09353): W' = m * (W + s B A) / |W + s B A|, the norm by rows or by columns.
    """
    change = torch.zeros_like(weight)
    if "diff" in parts.stored:
        change = change + _read(parts, "diff").reshape(weight.shape)
    if (factors := low_rank(parts)) is not None:
        down, up = factors
        change = change + (up @ down).reshape(weight.shape)
    if "lokr_w1" in parts.stored or "lokr_w1_a" in parts.stored:
        first, second = (
            _read(parts, side).flatten(1)
            if side in parts.stored
            else _read(parts, f"{side}_a").flatten(1) @ _read(parts, f"{side}_b").flatten(1)
            for side in ("lokr_w1", "lokr_w2")
        )
        change = change + parts.scale * torch.kron(first, second).reshape(weight.shape)
    if "magnitude" in parts.stored:
        moved = weight + change
        change = (moved.flatten(1) * _gain(parts, moved)).reshape(weight.shape) - weight
    return change


def low_rank(parts: LayerParts) -> Factors | None:
    """Return the factors of what a file adds, its scale in `up`; None where it has no low rank.

    LoHa, (A1 B1) * (A2 B2), has the rank of both products multiplied: the products of their columns and rows.
    """
    if "down" in parts.stored:
        return _read(parts, "down").flatten(1), parts.scale * _read(parts, "up").flatten(1)
    if "hada_w1_a" in parts.stored:
        up1, down1, up2, down2 = (
            _read(parts, f"hada_{side}").flatten(1) for side in ("w1_a", "w1_b", "w2_a", "w2_b")
        )
        up = (up1[:, :, None] * up2[:, None, :]).flatten(1)
        down = (down1[:, None, :] * down2[None, :, :]).flatten(0, 1)
        return down, parts.scale * up
    return None


def _gain(parts: LayerParts, moved: Tensor) -> Tensor:
    """Return DoRA's m / |W'|, [rows, 1] or [1, columns]."""
    magnitude, flat = _read(parts, "magnitude"), moved.flatten(1)
    by_row = magnitude.shape[0] == len(flat) or magnitude.numel() != flat.shape[1]
    norm = flat.norm(dim=1 if by_row else 0, keepdim=True)
    return magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _read(parts: LayerParts, part: str) -> Tensor:
    return parts.stored[part].read().float()


def _beside(weight: Tensor, changes: Sequence[Change]) -> tuple[Factors | None, Tensor | None, Tensor | None]:
    """Return what stands beside a packed weight: factors, a full difference, a share of its own output."""
    factors: list[Factors] = []
    full, own = None, None
    for strength, parts in changes:
        pair, gain = low_rank(parts), torch.ones(1, 1)
        if pair is not None and "magnitude" in parts.stored:
            gain = _gain(parts, weight + (pair[1] @ pair[0]).reshape(weight.shape))
        if pair is None or "diff" in parts.stored or gain.shape[1] > 1:
            added = strength * weight_change(parts, weight)
            full = added if full is None else full + added
            continue
        if "magnitude" in parts.stored:
            # g (W + s B A), a row at a time: W's own output times g - 1, and the factors times g.
            share = strength * (gain.flatten() - 1)
            own = share if own is None else own + share
        factors.append((pair[0], strength * gain * pair[1]))
    joined = None
    if factors:
        joined = torch.cat([down for down, _ in factors]), torch.cat([up for _, up in factors], dim=1)
    return joined, full, own


def _level(dit: nn.Module) -> None:
    """Give the same layer of each block what another block's has, filled with zeros: blocks stream alike."""
    alike: dict[str, list[PackedLinear]] = defaultdict(list)
    for name, module in dit.named_modules():
        if isinstance(module, PackedLinear) and (match := re.fullmatch(r"blocks\.\d+\.(.+)", name)):
            alike[match[1]].append(module)
    for modules, name in product(alike.values(), ("down", "up", "full", "own")):
        given = [getattr(module, name) for module in modules]
        shapes = {tensor.shape for tensor in given if tensor is not None}
        largest = [max(sides) for sides in zip(*shapes, strict=True)]
        for module, tensor in zip(modules, given, strict=True):
            if shapes - {None if tensor is None else tensor.shape}:
                filled = torch.zeros(largest, dtype=torch.bfloat16, device=module.weight.device)
                if tensor is not None:
                    filled[tuple(map(slice, tensor.shape))] = tensor
                setattr(module, name, filled)
