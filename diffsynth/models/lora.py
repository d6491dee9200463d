"""LoRA files for the DiT: which layers they change, and by how much.

Understood names: `<module>.lora_A[.<adapter>].weight` / `lora_B` (PEFT, diffusers),
`<module>.lora_down.weight` / `lora_up` with an optional `<module>.alpha` (kohya, also with the flattened
`lora_unet_` names), and `<module>.diff` / `.diff_b` (full differences of weight and bias, as distilled
models carry them). Modules may be named the official or the diffusers way.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from diffsynth.models.checkpoint_files import CheckpointError, StoredTensor, open_weights
from diffsynth.models.packed_linear import PackedLinear, pack
from diffsynth.models.wan_video_dit_keys import diffusers_module, official_module

logger = logging.getLogger(__name__)

_DIFFUSERS_CONFIG = "lora_adapter_metadata"
_PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "model.")
_PART = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down|lora\.down)(?:\.\w+)?\.weight|"
    r"(?P<up>lora_B|lora_up|lora\.up)(?:\.\w+)?\.weight|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))"
)


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file, matched to a DiT.

    Attributes:
        alpha: the caller's strength.
        default_scale: the file's, where it names no alpha.
        layers: the parts that change each layer, those of the names of `_PART` that the file has.
    """

    path: Path
    alpha: float
    default_scale: float
    layers: dict[str, dict[str, StoredTensor]]

    def weight_delta(self, layer: str, shape: torch.Size) -> Tensor:
        """What the file adds to a layer's weight at alpha 1, float32, in the weight's shape."""
        parts, delta = self.layers[layer], torch.zeros(shape)
        if "diff" in parts:
            delta = delta + parts["diff"].read().float().reshape(shape)
        if "down" in parts:
            down, up = (parts[name].read().float().flatten(1) for name in ("down", "up"))
            scale = parts["alpha"].read().item() / down.shape[0] if "alpha" in parts else self.default_scale
            delta = delta + scale * (up @ down).reshape(shape)
        return delta


def read_lora(path: str | Path, alpha: float, dit: nn.Module) -> Lora:
    """Open a LoRA file and match it to the DiT's layers.

    Logs how many layers match and names keys that are not understood. Raises FileNotFoundError if it is
    missing, CheckpointError if it is damaged, if half of a pair is missing or has the wrong size, or if it
    matches no layer.
    """
    path = Path(path).resolve()
    tensors = open_weights([path])
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be a finite number; got {alpha!r}")
    modules = {name: m for name, m in dit.named_modules() if getattr(m, "weight", None) is not None}
    layers: dict[str, dict[str, StoredTensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _PART.fullmatch(key)
        module = match and _resolve(match["module"], modules)
        if not module:
            unknown.append(key)
            continue
        part, parts = match.lastgroup, layers.setdefault(module, {})
        if part in parts:
            raise CheckpointError(f"LoRA {path} holds several adapters for {module}; give one a file")
        parts[part] = tensor
    layers = {name: parts for name, parts in layers.items() if parts.keys() != {"alpha"}}
    if not layers:
        raise CheckpointError(
            f"LoRA {path} matches no layer of the DiT, so it would have no effect; "
            f"its keys begin with {unknown[:3]}"
        )
    for name, parts in layers.items():
        _check_sizes(f"LoRA {path}", name, parts, modules[name])
    matched = len(tensors) - len(unknown)
    logger.info("LoRA %s: %d of %d keys match, in %d layers", path.name, matched, len(tensors), len(layers))
    if unknown:
        logger.warning("LoRA %s leaves out %d unknown keys: %s", path.name, len(unknown), unknown[:5])
    return Lora(path, alpha, _default_scale(path), layers)


def _resolve(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The official path of a module that a LoRA file names in its own way; None if there is none."""
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name.startswith("lora_unet_"):
        flat = name.removeprefix("lora_unet_")
        return next((path for path in modules if flat in _flat_names(path)), None)
    return next((path for path in (name, official_module(name)) if path in modules), None)


def _flat_names(path: str) -> set[str]:
    """A module's path with underscores for dots, as kohya has it, in the official and the diffusers way."""
    return {name.replace(".", "_") for name in (path, diffusers_module(path)) if name}


def _check_sizes(lora: str, name: str, parts: Mapping[str, StoredTensor], module: nn.Module) -> None:
    if ("down" in parts) != ("up" in parts):
        raise CheckpointError(f"{lora} has only one half of the pair for {name}")
    shape, bias = module.weight.shape, getattr(module, "bias", None)
    if "diff_b" in parts and (bias is None or parts["diff_b"].shape != bias.shape):
        raise CheckpointError(f"{lora} does not fit the bias of {name}; it is for another model")
    fits = "diff" not in parts or parts["diff"].shape.numel() == shape.numel()
    if fits and "down" in parts:
        down, up = parts["down"].shape, parts["up"].shape
        fits = (up[0], up[1:].numel(), down[1:].numel()) == (shape[0], down[0], shape[1:].numel())
    if not fits:
        sizes = ", ".join(f"{part} {tuple(stored.shape)}" for part, stored in parts.items())
        raise CheckpointError(
            f"{lora} does not fit {name}: weight {tuple(shape)}, {sizes}; it is for another model"
        )


def _default_scale(path: Path) -> float:
    """alpha / rank, from the file's header (diffusers) or adapter_config.json beside it (PEFT); else 1."""
    text = None
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_DIFFUSERS_CONFIG)
    source = f"the header of {path}"
    if text is None:
        source = config = path.parent / "adapter_config.json"
        if not config.is_file():
            return 1.0
        text = config.read_bytes()
    try:
        # In the header of a pipeline's LoRA the names begin with the model's, "transformer.r".
        declared = {name.removeprefix("transformer."): value for name, value in json.loads(text).items()}
        rank = declared["r"] ** 0.5 if declared.get("use_rslora") else declared["r"]
        scale = declared["lora_alpha"] / rank
        if not math.isfinite(scale):
            raise ValueError(f"alpha / rank is {scale}")
        return scale
    except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} is no adapter config with lora_alpha and r ({error!r})") from error


def merge(
    dit: nn.Module, base: Mapping[str, StoredTensor], loras: Iterable[Lora], modules: Iterable[str]
) -> None:
    """Set the named layers of the DiT to their stored weights plus what the LoRAs add, summed in float32.

    Starting from the file each time makes removal exact and keeps rounding from piling up.
    """
    loras = list(loras)
    for name in modules:
        module = dit.get_submodule(name)
        changing = [lora for lora in loras if name in lora.layers]
        weight = base[f"{name}.weight"].read().float()
        for lora in changing:
            weight = weight + lora.alpha * lora.weight_delta(name, weight.shape)
        if isinstance(module, PackedLinear):
            packed, scale = pack(weight, module.stored)
            module.weight, module.scale = packed.to(module.weight.device), scale.to(module.scale)
        else:
            module.weight.data = weight.to(module.weight)
        if getattr(module, "bias", None) is not None and f"{name}.bias" in base:
            bias = base[f"{name}.bias"].read().float()
            for lora in changing:
                if (change := lora.layers[name].get("diff_b")) is not None:
                    bias = bias + lora.alpha * change.read().float()
            module.bias.data = bias.to(module.bias)
