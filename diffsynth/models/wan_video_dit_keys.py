"""Names of the DiT's tensors in the diffusers layout, and the model's arguments read off names and shapes."""

import logging
import re
from collections.abc import Mapping
from math import prod
from typing import Any

from diffsynth.models.names import NAMES

logger = logging.getLogger(__name__)

LEAST_PUBLISHED_WIDTH = 1024  # of a DiT; in all that are wider heads are 128 wide
_TOP, _TENSORS, _BLOCK = (NAMES["dit"][part] for part in ("modules", "tensors", "block"))
_DIFFUSERS_SIZES = {"in_channels": "in_dim", "out_channels": "out_dim"}
_BLOCK_PATH = re.compile(r"(blocks\.\d+)\.(.+)")


def official_module(path: str) -> str | None:
    """Return the official path of a module of the diffusers layout; None if it is not one."""
    match = _BLOCK_PATH.fullmatch(path)
    if match is None:
        return _TOP.get(path)
    inner = _BLOCK.get(match[2])
    return None if inner is None else f"{match[1]}.{inner}"


def diffusers_module(path: str) -> str | None:
    """Return the path in the diffusers layout of an official module, the inverse of `official_module`."""
    match = _BLOCK_PATH.fullmatch(path)
    table, name = (_TOP, path) if match is None else (_BLOCK, match[2])
    theirs = next((theirs for theirs, ours in table.items() if ours == name), None)
    return theirs if match is None or theirs is None else f"{match[1]}.{theirs}"


def official_key(key: str) -> str | None:
    """Return the official name of a tensor of the diffusers layout; None if it is not one."""
    if key in _TENSORS:
        return _TENSORS[key]
    path, _, tensor = key.rpartition(".")
    if tensor == "scale_shift_table" and _BLOCK_PATH.fullmatch(f"{path}.x"):
        return f"{path}.modulation"
    module = official_module(path)
    return None if module is None else f"{module}.{tensor}"


def dit_config_from_shapes(shapes: Mapping[str, tuple[int, ...]], declared: Mapping[str, Any]) -> dict:
    """Return the arguments of `WanModel` that official names and shapes of tensors tell.

    Shapes do not tell the number of heads: it comes from `declared` (the config.json beside the weights,
    official or diffusers style), else heads are 128 wide, as in every published model.

    Raises:
        ValueError: neither number of heads fits, or a declared size is not that of the weights.
    """
    dim, in_dim, *patch_size = shapes["patch_embedding.weight"]
    num_heads = declared.get("num_heads", declared.get("num_attention_heads"))
    if num_heads is None:
        if dim % 128:
            raise ValueError(
                f"cannot tell the number of heads of a DiT of width {dim}: "
                "put a config.json with num_heads beside the weights"
            )
        num_heads = dim // 128
    blocks = {int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key))}
    found = {
        "dim": dim,
        "in_dim": in_dim,
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "out_dim": shapes["head.head.weight"][0] // prod(patch_size),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "num_layers": max(blocks) + 1,
        "patch_size": tuple(patch_size),
    }
    _check_declared(declared, found, num_heads)
    image = {}
    if "img_emb.proj.0.weight" in shapes:
        positions = shapes.get("img_emb.emb_pos", (1, 0))[1]
        image = {"image_dim": shapes["img_emb.proj.0.weight"][0], "image_positions": positions}
    return {
        **found,
        "num_heads": num_heads,
        "eps": declared.get("eps", 1e-6),
        "has_image_input": bool(image),
        "has_clean_first_frame": declared.get("model_type") == "ti2v",
        "text_len": declared.get("text_len", 512),
        **image,
    }


def _check_declared(declared: Mapping[str, Any], found: Mapping[str, Any], num_heads: int) -> None:
    """Raise ValueError if a config.json contradicts the sizes that the weights tell."""
    dim, takes_picture = found["dim"], found["in_dim"] > found["out_dim"]
    own = dim / num_heads
    width = declared.get("attention_head_dim", 128 if dim >= LEAST_PUBLISHED_WIDTH else own)
    told = {**found, "patch_size": list(found["patch_size"])}
    told |= {theirs: found[ours] for theirs, ours in _DIFFUSERS_SIZES.items()}
    wrong = [
        f"{name} {declared[name]!r:.80} is declared, but the weights have {name} {size}"
        for name, size in told.items()
        if declared.get(name, size) != size
    ]
    if own != width:
        wrong.append(f"num_heads {num_heads} is declared, but heads of {width} columns make {dim / width:g}")
    if declared.get("model_type") in (("t2v", "ti2v") if takes_picture else ("i2v", "flf2v")):
        which = "take" if takes_picture else "do not take"
        logger.warning(
            "config.json: model_type %r, but the weights %s pictures", declared["model_type"], which
        )
    if wrong:
        raise ValueError(f"in config.json {'; '.join(wrong)}")
