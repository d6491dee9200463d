"""Read LoRA files in the formats of common trainers, and match their tensors to the layers of a DiT.

| parts of a layer                                             | written by                                |
| `lora_A[.adapter].weight`, `lora_B[.adapter].weight`         | PEFT, diffusers, DiffSynth, ai-toolkit    |
| `lora_down.weight`, `lora_up.weight`, `alpha`                | kohya, musubi-tuner, lightx2v             |
| `lora_magnitude_vector`, `dora_scale`, `dora_layer.weight`   | DoRA: PEFT, LyCORIS, musubi-tuner         |
| `lora_B.bias`                                                | PEFT with lora_bias                       |
| `hada_w1_a`, `hada_w1_b`, `hada_w2_a`, `hada_w2_b`           | LoHa: LyCORIS, PEFT                       |
| `lokr_w1`, `lokr_w2`, or their factors `_a`, `_b`            | LoKr: LyCORIS, PEFT, ai-toolkit           |
| `diff`, `diff_b`, `diff_m`, `w_norm`, `b_norm`               | differences of weight, bias, modulation   |

Layers may have official or diffusers names, with a prefix, or with underscores instead of dots.
A file is either applied as its trainer intended or rejected: if a tensor of an unknown kind belongs to an
existing layer, it may change the meaning of that layer's other tensors.
"""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from diffsynth.models.checkpoint_files import CheckpointError, StoredTensor, is_safetensors, open_weights
from diffsynth.models.model_kinds import foreign_family
from diffsynth.models.packed_linear import PackedLinear
from diffsynth.models.wan_video_dit_keys import diffusers_module, official_module

logger = logging.getLogger(__name__)

_DIFFUSERS_CONFIG = "lora_adapter_metadata"
# Not "ss_network_alpha": musubi-tuner's converter keeps it, and has already multiplied the tensors by it.
_ALPHAS = ("lora_alpha", "alpha", "network_alpha")
_PREFIXES = ("base_model.model.", "pipe.dit.", "model.", "diffusion_model.", "transformer.", "dit.")
_RSLORA_FLAG, _DORA_FLAG = "use_rslora_flag", "use_dora_flag"  # musubi-tuner's, for a whole file
# Sets of tensors of which a layer has all or none.
_WHOLE = (
    {"down", "up"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1_a", "lokr_w1_b"},
    {"lokr_w2_a", "lokr_w2_b"},
)
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight|"
    r"(?P<up>lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight|"
    r"(?P<up_bias>lora_B|lora_up)(?:\.\w+)?\.bias|"
    r"(?P<magnitude>lora_magnitude_vector(?:\.\w+)*|dora_scale|dora_layer\.weight)|"
    + "".join(rf"(?P<{name}>{name})|" for name in sorted({"lokr_w1", "lokr_w2"}.union(*_WHOLE[1:])))
    + r"(?P<alpha>alpha)|(?P<diff>diff|w_norm)|(?P<diff_b>diff_b|b_norm)|(?P<diff_m>diff_m|modulation\.diff))"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerParts:
    """The tensors in a LoRA file that change one layer."""

    stored: dict[str, StoredTensor]  # by the group names of `_PART`
    scale: float  # multiplies the product of the low-rank factors; alpha / rank in most files


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A LoRA file, matched to a DiT."""

    path: Path  # links resolved
    alpha: float  # the strength that the caller has chosen
    layers: dict[str, LayerParts]  # by their official names
    dits: tuple[str, ...] = ()  # names of the DiTs that it changes


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """The alpha and rank that a LoRA declares outside of its tensors, for all layers or by name."""

    source: str  # where they are declared, for messages
    alpha: float | None = None  # None if none is declared
    rank: float | None = None  # None to use the rank of each layer's tensors
    alphas: Mapping[str, float] = field(default_factory=dict)  # by patterns of names, by PEFT's rules
    ranks: Mapping[str, float] = field(default_factory=dict)  # likewise
    by_root: bool = False  # whether the scale is alpha / sqrt(rank), as in rs-LoRA

    def of(self, name: str, parts: Mapping[str, StoredTensor]) -> float:
        """Return the scale of a layer, given its name in the file; 1 if alpha or rank is unknown.

        LoKr with two full tensors has no rank but a declared one. A tensor `alpha` takes precedence.

        Raises:
            CheckpointError: the rank of the layer's tensors is not the declared one.
        """
        factor = next((p for p in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b") if p in parts), None)
        rank: float | None = None if factor is None else parts[factor].shape[0]
        if "alpha" in parts:
            alpha: float | None = parts["alpha"].read().item()
        elif (alpha := _matching(self.alphas, name, self.alpha)) is not None:
            declared = _matching(self.ranks, name, self.rank)
            if rank is not None and declared not in (None, rank):
                raise CheckpointError(f"{self.source} declares rank {declared:g} for {name}; it has {rank}")
            rank = declared if rank is None else rank
        if alpha is None or rank is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def read_lora(path: str | Path, alpha: float, dit: nn.Module) -> Lora:
    """Open a LoRA file and match it to the DiT's layers.

    Logs how many layers match, where the scale comes from, and which keys belong to no layer.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: alpha is no finite number.
        CheckpointError: it is damaged, matches no layer, is for another model, or holds something that cannot
            be applied as its trainer meant it.
    """
    path = Path(path)
    lora = f"LoRA {path}"
    alpha = checked_strength(alpha)
    if not path.is_file():
        raise FileNotFoundError(f"{lora} is no file")
    tensors = open_weights([path])
    flags = {name: bool(tensors.pop(name).read()) for name in (_RSLORA_FLAG, _DORA_FLAG) if name in tensors}
    modules = dict(dit.named_modules())
    weighted = {
        name: module for name, module in modules.items() if getattr(module, "weight", None) is not None
    }
    modulated = {name: module for name, module in modules.items() if hasattr(module, "modulation")}
    stored: dict[str, dict[str, StoredTensor]] = {}
    names: dict[str, str] = {}  # each layer's name in the file
    unknown = []
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        layer = match and _resolve(match["module"], modulated if match["diff_m"] else weighted)
        if not match or not layer:
            _refuse_unknown_part(lora, key, weighted)
            unknown.append(key)
            continue
        part, parts = str(match.lastgroup), stored.setdefault(layer, {})
        if part in parts:
            raise CheckpointError(f"{lora} holds several adapters for {layer}; save each in its own file")
        parts[part] = tensor
        names[layer] = _without_prefix(match["module"])
    stored = {layer: parts for layer, parts in stored.items() if parts.keys() != {"alpha"}}
    if not stored:
        if family := foreign_family(tensors):
            raise CheckpointError(f"{lora} matches no layer of the DiT: it is a LoRA for {family}")
        raise CheckpointError(
            f"{lora} matches no layer of the DiT, so it would have no effect; "
            f"its keys begin with {unknown[:3]}"
        )
    if flags.get(_DORA_FLAG) is False and any("magnitude" in parts for parts in stored.values()):
        raise CheckpointError(f"{lora} has DoRA magnitudes, but its {_DORA_FLAG} says it is not a DoRA")
    for layer, parts in stored.items():
        _check_sizes(lora, layer, parts, modules[layer])
    scaling = _scaling(path, flags.get(_RSLORA_FLAG, False))
    layers = {
        layer: LayerParts(stored=parts, scale=scaling.of(names[layer], parts))
        for layer, parts in stored.items()
    }
    matched = len(tensors) - len(unknown)
    logger.info("LoRA %s: %d of %d keys match, in %d layers", path.name, matched, len(tensors), len(layers))
    scales = sorted({parts.scale for parts in layers.values()})
    own = any("alpha" in parts.stored for parts in layers.values())
    source = "its tensors named alpha" if own else scaling.source
    logger.info("LoRA %s: scale %s, from %s", path.name, ", ".join(f"{s:g}" for s in scales[:4]), source)
    if unknown:
        logger.warning("LoRA %s leaves out %d unknown keys: %s", path.name, len(unknown), unknown[:5])
    return Lora(path=path.resolve(), alpha=alpha, layers=layers)


def checked_strength(alpha: float) -> float:
    """Return a LoRA's strength; ValueError if it is not a finite number."""
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be a finite number; got {alpha!r}")
    return alpha


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _resolve(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the official path of the module that a name in a LoRA file refers to; None if there is none."""
    name = _without_prefix(name)
    # kohya replaces the dots in names of either layout; VideoX-Fun's prefix ends in two underscores.
    if flat := re.fullmatch(r"(?:lora_unet|lycoris)__?(.+)", name):
        both = ((path, name) for path in modules for name in (path, diffusers_module(path)) if name)
        return next((path for path, name in both if name.replace(".", "_") == flat[1]), None)
    return next((path for path in (name, official_module(name)) if path in modules), None)


def _refuse_unknown_part(lora: str, key: str, modules: Mapping[str, nn.Module]) -> None:
    """Raise CheckpointError if an unrecognised key belongs to an existing layer."""
    dots = [match.start() for match in re.finditer(r"\.", key)]
    for dot in reversed(dots):
        if layer := _resolve(key[:dot], modules):
            raise CheckpointError(
                f"{lora} holds {key[dot + 1 :]!r} for {layer}: this kind of LoRA is not supported, and "
                "leaving this tensor out would change what the LoRA does"
            )


def _check_sizes(lora: str, layer: str, parts: Mapping[str, StoredTensor], module: nn.Module) -> None:
    for whole in _WHOLE:
        if 0 < len(whole & parts.keys()) < len(whole):
            kind = "one half of the pair" if len(whole) == 2 else "some parts"
            raise CheckpointError(f"{lora} has only {kind} for {layer}")
    lokr = [any(f"lokr_{side}{end}" in parts for end in ("", "_a")) for side in ("w1", "w2")]
    if any(lokr) and not all(lokr):
        raise CheckpointError(f"{lora} has only one half of the pair for {layer}")
    alpha = parts["alpha"].read() if "alpha" in parts else torch.ones(1)
    if alpha.numel() != 1 or not alpha.float().isfinite():
        raise CheckpointError(f"{lora} has an alpha for {layer} that is no finite number")
    bias = getattr(module, "bias", None)
    for part in ("diff_b", "up_bias"):
        if part in parts and (bias is None or parts[part].shape != bias.shape):
            raise CheckpointError(f"{lora} does not fit the bias of {layer}; it is for another model")
    modulation = getattr(module, "modulation", None)
    if "diff_m" in parts and (modulation is None or parts["diff_m"].shape.numel() != modulation.numel()):
        raise CheckpointError(f"{lora} does not fit the modulation of {layer}; it is for another model")
    shape = getattr(getattr(module, "weight", None), "shape", None)
    if isinstance(module, PackedLinear):  # its weight has bytes, in GGUF not one for each number
        shape = torch.Size([module.out_features, module.in_features])
    if shape is not None and not _fits(parts, shape):
        sizes = ", ".join(f"{part} {tuple(stored.shape)}" for part, stored in parts.items())
        raise CheckpointError(f"{lora} does not fit {layer}, {tuple(shape)}: {sizes}; it is of another model")


def _fits(parts: Mapping[str, StoredTensor], shape: torch.Size) -> bool:
    out, columns = shape[0], shape[1:].numel()
    fits = "diff" not in parts or parts["diff"].shape.numel() == shape.numel()
    for up, down in (("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b")):
        if up in parts:
            u, d = parts[up].shape, parts[down].shape
            fits &= (u[0], u[1:].numel(), d[1:].numel()) == (out, d[0], columns) and d[0] > 0
    if "lokr_w1" in parts or "lokr_w1_a" in parts:
        rows, cols = 1, 1
        for side in ("lokr_w1", "lokr_w2"):
            first, last = (parts[side],) * 2 if side in parts else (parts[f"{side}_a"], parts[f"{side}_b"])
            rows, cols = rows * first.shape[0], cols * last.shape[1:].numel()
        fits &= (rows, cols) == (out, columns)
    if "magnitude" in parts:
        fits &= parts["magnitude"].shape.numel() == out or tuple(parts["magnitude"].shape) == (1, columns)
    return fits


def _matching(patterns: Mapping[str, float], name: str, default: float | None) -> float | None:
    """Return the value of the first pattern that matches the end of a layer's name, by PEFT's rules."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _scaling(path: Path, by_root: bool) -> Scaling:
    """Return the scaling declared in the header (diffusers, kohya) or in PEFT's adapter_config.json."""
    header: Mapping[str, str] = {}
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    source, text = f"the header of {path}", header.get(_DIFFUSERS_CONFIG)
    config = path.parent / "adapter_config.json"
    flat = next((name for name in _ALPHAS if name in header), None)
    try:
        if text is None and config.is_file():
            source, text = str(config), config.read_text()
        if text is not None:
            return _declared_scaling(source, json.loads(text), by_root)
        if flat is None:
            return Scaling(source="the default: the file declares none", by_root=by_root)
        root = by_root or str(header.get("use_rslora", "")).lower() in ("true", "1")
        return Scaling(source=source, alpha=_finite(header[flat]), by_root=root)
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} is no adapter config with lora_alpha and r ({error!r})") from error


def _declared_scaling(source: str, config: Mapping[str, Any], by_root: bool) -> Scaling:
    # In the header of a diffusers pipeline's LoRA, keys begin with the model's name: "transformer.r".
    declared = {name.removeprefix("transformer."): value for name, value in config.items()}
    alpha = declared["lora_alpha"] if "lora_alpha" in declared else declared["alpha"]  # LoHa and LoKr: alpha
    if str(start := declared.get("init_lora_weights")).lower().startswith(("pissa", "olora", "corda")):
        raise ValueError(f"with init_lora_weights={start!r} PEFT changes the model's own weights, too")
    scaling = Scaling(
        source=source,
        alpha=_finite(alpha),
        rank=_finite(declared["r"]),
        alphas={key: _finite(value) for key, value in (declared.get("alpha_pattern") or {}).items()},
        ranks={key: _finite(value) for key, value in (declared.get("rank_pattern") or {}).items()},
        by_root=by_root or bool(declared.get("use_rslora")),
    )
    for key in (*scaling.alphas, *scaling.ranks):
        re.compile(key)
    if min([_finite(declared["r"]), *scaling.ranks.values()]) <= 0:
        raise ValueError("a rank is not above 0")
    return scaling


def _finite(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{value!r} is no finite number")
    return number
