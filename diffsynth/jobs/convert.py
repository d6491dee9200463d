"""Rewriting a checkpoint so that its DiT is stored as it is used, and can be mapped from disk.

The published DiTs are stored in float32. Loaded as bfloat16 they are converted in memory: 28 GB for 14B. Once
converted on disk, the system reads and drops pages of the file as they are needed.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError

from diffsynth.data.files import unfinished
from diffsynth.models.checkpoint_files import CheckpointError, StoredTensor, files_of, open_weights
from diffsynth.models.model_kinds import kind_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHARD_BYTES = 5 * 10**9
_STEM = "diffusion_pytorch_model"
_DIT = "wan_video_dit"


def convert_checkpoint(
    folder: str | Path,
    output: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint folder in the official layout whose DiT is stored in `dtype`; return its path.

    It loads as the numbers that loading `folder` with this dtype gives. The other files are hard links, or
    copies where the disk is another. One shard is in memory at a time. A complete output is left as it is.

    Args:
        folder: folder of the checkpoint.
        output: folder to write.
        dtype: dtype of the stored weights: bfloat16, float16 or float32.
        shard_bytes: largest size of a shard in bytes; one that holds a single tensor may be larger.

    Raises:
        ValueError: another dtype.
        FileExistsError: the output exists.
        OSError: the output cannot be written.
        FileNotFoundError, CheckpointError: the folder does not hold a whole DiT in the official layout.
    """
    folder, output = Path(folder), Path(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}; got {dtype!r}")
    dit_files, tensors = _dit_of(folder)
    if output.exists():
        if _is_converted(output, tensors, dtype):
            return output
        raise FileExistsError(f"output {output} is there, and holds something else; name a new folder")
    with unfinished(output, folder=True) as partial:
        shutil.copytree(
            folder,
            partial,
            copy_function=_link,
            ignore=lambda _parent, names: {n for n in names if n in dit_files or n.startswith(_STEM)},
            dirs_exist_ok=True,
        )
        try:
            _write_shards(tensors, partial, dtype, shard_bytes)
        except SafetensorError as error:
            raise OSError(f"output {output} cannot be written: {error}") from error
        return partial.rename(output)


def _is_converted(output: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype) -> bool:
    """Return whether a folder holds these tensors in a dtype; the smallest ones are compared by content."""
    try:
        there = _dit_of(output)[1]
    except (CheckpointError, FileNotFoundError, NotADirectoryError):
        return False
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in there.items()}:
        return False
    small = sorted(tensors, key=lambda name: tensors[name].shape.numel())[:8]
    pairs = [(tensors[name].read().to(dtype), there[name].read()) for name in small]
    return all(new.dtype == old.dtype and new.equal(old) for new, old in pairs)


def _dit_of(folder: Path) -> tuple[set[str], Mapping[str, StoredTensor]]:
    """Names of the files of the folder's DiT, and its tensors."""
    for files in files_of(folder):
        if files[0].parent == folder:
            tensors = open_weights(files)
            kind = kind_of(tensors)
            if kind is not None and kind.name == _DIT:
                return {file.name for file in files}, tensors
    raise CheckpointError(f"{folder} holds no DiT in the official layout")


def _link(source: str, target: str) -> None:
    try:
        os.link(Path(source).resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def _write_shards(
    tensors: Mapping[str, StoredTensor], folder: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    sizes = {name: torch.empty(t.shape, dtype=dtype, device="meta") for name, t in tensors.items()}
    pattern = f"{_STEM}{{suffix}}.safetensors"
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=pattern, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].read().to(dtype).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{_STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2))
