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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

DOWNLOAD_HINT = "published checkpoints are fetched by: python examples/download_model.py --model 1.3b"
_SHARD = re.compile(r"-\d{5}-of-(\d{5})$")
# Names under which weights are published: such files must be whole, others in a folder may be anything.
PUBLISHED_NAME = re.compile(
    r"(diffusion_pytorch_model|model|models_t5|Wan2\.1_VAE)\b.*\.(safetensors|pth)|models_t5.*"
)
_WRAPPERS = ("model_state", "state_dict", "model")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
# Where the diffusers layout keeps its weights.
_COMPONENTS = ("transformer", "text_encoder", "vae")
# What reading bytes that are no pickle, or half of one, ends in.
_DAMAGE = (
    RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError, AttributeError, OverflowError,
    AssertionError, struct.error,
)  # fmt: skip


class CheckpointError(ValueError):
    """A weight file is damaged, or is not what was asked for."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a weight file; `read()` gives it on the CPU in the dtype of the file."""

    file: Path
    shape: torch.Size
    read: Callable[[], Tensor]


def open_weights(files: Sequence[Path]) -> dict[str, StoredTensor]:
    """Names and tensors of the files that make up one model.

    Raises FileNotFoundError for a missing file and CheckpointError for a damaged one, for one that holds
    more than tensors, and for a name that stands in two files; the message names the file.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"weight file {file} does not exist; {DOWNLOAD_HINT}")
        found = _open_safetensors(file) if is_safetensors(file) else _open_pickle(file)
        if twice := tensors.keys() & found.keys():
            name = min(twice)
            raise CheckpointError(f"{name!r} stands both in {tensors[name].file} and in {file}")
        tensors.update(found)
    prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), "")
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def is_safetensors(file: Path) -> bool:
    """Return whether a file is one of safetensors, told by its first bytes: a length, and JSON.

    Names do not tell: those of a hub's cache have no suffix. A cut or empty `.safetensors` counts, too, so
    that the error is about that format.

    Raises:
        CheckpointError: it is of a format that is not supported.
    """
    with file.open("rb") as opened:
        start = opened.read(9)
    if start[:4] == b"GGUF":
        raise CheckpointError(f"{file} is a GGUF file; these are not supported, take the safetensors")
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
    return {
        name: StoredTensor(
            file, torch.Size(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name)
        )
        for name in handle.keys()  # noqa: SIM118
    }


def _open_pickle(file: Path) -> dict[str, StoredTensor]:
    # Only the zip format of torch.save can be memory-mapped.
    mapped = zipfile.is_zipfile(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} holds more than tensors, or is no torch file; only plain tensor files are loaded"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{file} is truncated or not a torch file ({error}); fetch it again") from error
    while isinstance(content, dict) and len(content) == 1 and next(iter(content)) in _WRAPPERS:
        content = next(iter(content.values()))
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file} does not hold a state dict (names and tensors)")
    return {str(name): StoredTensor(file, t.shape, lambda t=t: t) for name, t in content.items()}


def files_of(entry: str | Path | Sequence[str | Path]) -> list[list[Path]]:
    """The groups of files, one group a model, that an entry of `ModelManager.load_models` names.

    Raises FileNotFoundError, naming what is missing, and CheckpointError for a damaged index.
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
    if path.name.endswith(".index.json"):
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
    for file in sorted(f for pattern in ("*.safetensors", "*.pth") for f in folder.glob(pattern)):
        if file not in indexed and not file.name.startswith("."):
            loose.setdefault(_SHARD.sub("", file.stem), []).append(file)
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
