"""Reading weight files: which files make up a model, and their tensors, read one at a time when asked for.

Nothing here knows what the tensors mean; `model_kinds` does. Files are memory-mapped, so opening a
checkpoint costs its header, and a tensor that is used as stored is never copied.
"""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from diffsynth.models.gguf_files import WIDE_KINDS, read_gguf, unpack_gguf
from diffsynth.models.packed_linear import PackedWeight

DOWNLOAD_HINT = "published checkpoints are fetched with: fastvmt download 1.3b"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})(\.\w+)?$")  # the variant stands before or behind the number
# Names under which weights are published: such files must be whole, others in a folder may be anything.
PUBLISHED_NAME = re.compile(
    r"(diffusion_pytorch_model|model|Wan2\.[12]_VAE)\b.*\.(safetensors|pth)|models_(t5|clip).*"
)
_WRAPPERS = ("model_state", "state_dict", "model")
# Endings of the scales of float8 weights, W = numbers * scale, and of tensors that only their kernels need.
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_OF_KERNELS = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
_FLOAT8 = ("F8_E4M3", "F8_E5M2", torch.float8_e4m3fn, torch.float8_e5m2)  # for safetensors, for torch
_SUFFIXES = ("safetensors", "sft", "gguf", "pth", "pt", "bin", "ckpt")
# Where the official layout of two experts, the diffusers layout and Comfy keep their weights.
_COMPONENTS = (
    "high_noise_model", "low_noise_model", "transformer", "transformer_2", "text_encoder", "vae",
    "image_encoder", "diffusion_models", "text_encoders", "clip_vision", "split_files",
)  # fmt: skip
# What reading bytes that are no pickle, or half of one, ends in.
_DAMAGE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, OverflowError,
    AssertionError, struct.error,
)  # fmt: skip


class CheckpointError(ValueError):
    """A weight file is damaged, or is not what was asked for."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a weight file."""

    file: Path  # that holds it
    shape: torch.Size  # of its numbers
    read: Callable[[], Tensor]  # gives it on the CPU, in the dtype of the file; packed weights in float32
    packed: Callable[[], PackedWeight] | None = None  # gives a packed matrix as the file has it


def open_weights(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Return names and tensors of the files that make up one model, or several in one file.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: one is damaged, holds more than tensors, or is of a kind that is not supported, or a
            name stands in two files; the message names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"weight file {file} does not exist; {DOWNLOAD_HINT}")
        with file.open("rb") as opened:
            is_gguf = opened.read(4) == b"GGUF"
        read = _open_gguf if is_gguf else _open_safetensors if is_safetensors(file) else _open_pickle
        found = read(file)
        if twice := tensors.keys() & found.keys():
            name = min(twice)
            raise CheckpointError(f"{name!r} stands both in {tensors[name].file} and in {file}")
        tensors.update(found)
    return _scaled(tensors)


def _scaled(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Put float8 weights and their scales together, whichever way they are named."""
    scales = {
        f"{key.removesuffix(ending)}.weight": key
        for ending in _SCALES
        for key in tensors
        if key.endswith(ending)
    }
    found = {
        key: tensor
        for key, tensor in tensors.items()
        if key not in scales.values() and not key.endswith(_OF_KERNELS)
    }
    for key in scales.keys() & found.keys():
        if (note := tensors.get(f"{key.removesuffix('.weight')}.comfy_quant")) is not None:
            stored = json.loads(bytes(note.read().tolist())).get("format", "")
            if not stored.startswith("float8"):
                raise CheckpointError(f"{note.file}: {key} is stored as {stored}; only float8 is supported")
        found[key] = _with_scale(key, found[key], tensors[scales[key]])
    return found


def _with_scale(key: str, tensor: StoredTensor, scale: StoredTensor) -> StoredTensor:
    rows = tensor.shape[0]
    if tensor.packed is None or scale.shape.numel() not in (1, rows):
        raise CheckpointError(
            f"{tensor.file}: the scale of {key} is {tuple(scale.shape)}, for a weight {tuple(tensor.shape)}; "
            "supported are float8 weights with one scale, or one for each row"
        )
    plain = tensor.packed

    def packed() -> PackedWeight:
        numbers = plain()
        return PackedWeight(numbers.data, scale.read().float().reshape(-1, 1).expand(rows, 1), numbers.stored)

    return StoredTensor(tensor.file, tensor.shape, lambda: packed().unpack(), packed)


def is_safetensors(file: Path) -> bool:
    """Return whether a file is one of safetensors, told by its first bytes: a length, and JSON.

    Names do not tell: those of a hub's cache have no suffix. A cut or empty `.safetensors` counts, too, so
    that the error is about that format.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    return start[8:9] == b"{" or (
        file.suffix in (".safetensors", ".sft") and start[:2] not in (b"PK", b"\x80\x02")
    )


def _open_safetensors(file: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is truncated or not a safetensors file ({error}); fetch it again"
        ) from error
    found = {}
    for name in handle.keys():  # noqa: SIM118
        stored = handle.get_slice(name)
        read = partial(handle.get_tensor, name)
        found[name] = _stored(file, torch.Size(stored.get_shape()), read, stored.get_dtype() in _FLOAT8)
    return found


def _stored(file: Path, shape: torch.Size, read: Callable[[], Tensor], is_float8: bool) -> StoredTensor:
    def packed() -> PackedWeight:
        numbers = read()
        return PackedWeight(numbers.view(torch.int8), torch.ones(len(numbers), 1), numbers.dtype)

    return StoredTensor(file, shape, read, packed if is_float8 and len(shape) == 2 else None)


def _open_gguf(file: Path) -> dict[str, StoredTensor]:
    try:
        tensors = read_gguf(file)
    except (ImportError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    found = {}
    for name, (data, kind, shape) in tensors.items():
        read = partial(unpack_gguf, data, kind, shape)
        packed = None
        if kind not in WIDE_KINDS and len(shape) == 2:
            packed = partial(PackedWeight, data.view(torch.int8), torch.ones(len(data), 0), kind)
        found[name] = StoredTensor(file, shape, read, packed)
    return found


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    # Only the zip format of torch.save can be memory-mapped, and torch goes by the suffix if it has the name.
    mapped = zipfile.is_zipfile(file) and file.suffix != ".safetensors"
    try:
        with nullcontext(file) if mapped else file.open("rb") as source:
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or is no torch file; only plain tensor files are loaded"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or not a torch file ({error}); fetch it again") from error
    while isinstance(content, dict) and (
        inner := next((content[w] for w in _WRAPPERS if isinstance(content.get(w), dict)), None)
    ):
        content = inner
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} does not hold a state dict (names and tensors)")
    return {str(name): _stored(file, t.shape, t.detach, t.dtype in _FLOAT8) for name, t in content.items()}


def files_of(entry: str | Path | Sequence[str | Path]) -> list[list[Path]]:
    """Return the groups of files, one group a model, that an entry of `ModelManager.load_models` names.

    Raises:
        FileNotFoundError: a file is missing; the message names it.
        CheckpointError: an index is damaged.
    """
    if not isinstance(entry, str | Path):
        if not isinstance(entry, Sequence) or len(entry) == 0:
            raise ValueError(f"an entry must be a path or a list of shards; got {entry!r}")
        return [[Path(file) for file in entry]]
    path = Path(entry)
    if path.is_dir():
        groups = _files_in_folder(path)
        if not groups:
            raise FileNotFoundError(f"folder {path} holds no weight files; {DOWNLOAD_HINT}")
        return groups
    if path.suffix == ".json":  # "x.index.json", "x.index.fp16.json"
        return [_files_of_index(path)]
    return [[path]]


def _files_of_index(index: Path) -> list[Path]:
    if not index.is_file():
        raise FileNotFoundError(f"index {index} does not exist; {DOWNLOAD_HINT}")
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors shards ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}; shards must lie beside their index")
    files = [index.parent / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        first = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} shards of {index.name}: {first}; {DOWNLOAD_HINT}"
        )
    return files


def _files_in_folder(folder: Path) -> list[list[Path]]:
    groups = [_files_of_index(index) for index in sorted(folder.glob("*.index.json"))]
    indexed = {file for group in groups for file in group}
    loose: dict[str, list[Path]] = {}
    for file in (f for suffix in _SUFFIXES for f in sorted(folder.glob(f"*.{suffix}"))):
        if file not in indexed and not file.name.startswith("."):
            files = loose.setdefault(_SHARD.sub(r"\2", file.stem), [file])
            # The same name with another suffix is the same model in another format.
            if file not in files and file.suffix == files[0].suffix:
                files.append(file)
    for stem, files in loose.items():
        shard = _SHARD.search(files[0].stem)
        if shard and len(files) != int(shard[1]):
            raise FileNotFoundError(
                f"{folder} has {len(files)} of {int(shard[1])} shards of {stem}; {DOWNLOAD_HINT}"
            )
        groups.append(files)
    for component in _COMPONENTS:
        if (folder / component).is_dir():
            groups += _files_in_folder(folder / component)
    return groups
