"""Identity of a saved run, which the call that continues it must share: arguments, reference and weights,
each by name, so that a refusal can say which of them differs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffsynth.configs.options import RunOptions
from diffsynth.data.files import sha256_of_file

SAMPLES = 16  # values read of each tensor
LONG = 200  # characters of an argument from which on its hash stands for it


def run_identity(
    models: Mapping[str, nn.Module],
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    pictures: Mapping[str, Image.Image],
    options: RunOptions,
) -> dict[str, str]:
    """Return what decides the result, as short texts: arguments, frames of the reference, weights."""
    positive, negative = ([pair[i] for pair in prompts] for i in (0, 1))
    identity = {"prompt": _short(positive), "negative_prompt": _short(negative)}
    for item in fields(options):
        if item.name not in ("output_type", "batch_cfg"):
            identity |= _named(item.name, getattr(options, item.name))
    identity.pop("motion.checkpoint", None)
    if pixels is not None:
        identity["input_video"] = f"frames of hash {_hash(pixels.numpy().data)}"
    for name, picture in pictures.items():
        identity[name] = f"{picture.width}x{picture.height} of hash {_hash(picture.tobytes())}"
    for name, model in models.items():
        identity[f"weights of {name}"] = weights_fingerprint(model)
    return identity


def identity_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> list[str]:
    """Return the differences between a saved identity and that of a call, as texts with name and values."""
    names = dict.fromkeys([*current, *saved])
    return [
        f"{name} (saved: {saved.get(name, 'nothing')}, now: {current.get(name, 'nothing')})"
        for name in names
        if saved.get(name) != current.get(name)
    ]


def identity_key(identity: Mapping[str, str]) -> str:
    """Return twelve characters that stand for an identity in file names."""
    return _hash(repr(sorted(identity.items())).encode())


def weights_fingerprint(model: nn.Module) -> str:
    """Return a hash of the names, types and shapes of a model's tensors and 16 evenly spread values of each.

    This takes well under a second for 14B parameters. Other checkpoints, types and LoRAs, merged or attached,
    change every value of a matrix, and so the hash; a change of single values may go unnoticed.
    """
    if (whole := vars(model).get("fingerprint")) is not None:  # this process holds only a share
        return whole
    digest = hashlib.sha256()
    sampled: dict[torch.device, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.numel() and tensor.device.type != "meta":
            step = max(1, tensor.numel() // SAMPLES)
            values = tensor.detach().flatten()[::step].contiguous().view(torch.uint8)
            sampled.setdefault(tensor.device, []).append(values)
    # One copy from each device instead of one for each tensor.
    for samples in sampled.values():
        digest.update(torch.cat(samples).cpu().numpy().data)
    return digest.hexdigest()[:12]


def _named(name: str, value: object) -> dict[str, str]:
    """Return an argument as texts: a dataclass by its fields, other objects by their types."""
    if is_dataclass(value):
        return {f"{name}.{item.name}": _short(getattr(value, item.name)) for item in fields(value)}
    plain = value is None or isinstance(value, bool | int | float | str | tuple | list)
    return {name: _short(value) if plain else type(value).__qualname__}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONG else f"{text[:60]}... of hash {_hash(text.encode())}"


def _hash(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def sha256_of_video(path: Path) -> str:
    """Return the hash of a video file, or of the names and contents of a folder's images in order of name."""
    if path.is_file():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")):
        digest.update(f"{file.name} {sha256_of_file(file)}\n".encode())
    return digest.hexdigest()


def sha256_of_frames(frames: Sequence[Image.Image]) -> str:
    """Return the hash of the sizes and pixels of frames."""
    digest = hashlib.sha256()
    for frame in frames:
        pixels = np.ascontiguousarray(frame.convert("RGB"))
        digest.update(f"{pixels.shape} ".encode())
        digest.update(pixels.data)
    return digest.hexdigest()
