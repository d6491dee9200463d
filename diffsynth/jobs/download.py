"""Fetch a published checkpoint from ModelScope or Hugging Face, and tell whether a folder holds all of it.

Only files that inference needs and that are not yet complete are fetched; both hubs continue where an
earlier download stopped. Completeness is judged without a network, by the sizes and contents of files.
"""

import json
import logging
import shlex
import shutil
import zipfile
from importlib import import_module
from pathlib import Path

from diffsynth.configs.checkpoints import PublishedCheckpoint

logger = logging.getLogger(__name__)

# The site of a hub, its package, the module of its errors, and the argument that names files.
_HUBS = {
    "modelscope": ("modelscope.cn", "modelscope", "modelscope.hub.errors", "allow_file_pattern"),
    "huggingface": ("huggingface.co", "huggingface_hub", "huggingface_hub.errors", "allow_patterns"),
}
SOURCES = tuple(_HUBS)
# Bytes; the format allows no longer header, so a larger number means that the file is something else.
_MAX_SAFETENSORS_HEADER = 100_000_000


class DownloadError(RuntimeError):
    """Raised when a checkpoint cannot be fetched; the message says why, and how to fetch it by hand."""


def missing_files(folder: str | Path, checkpoint: PublishedCheckpoint) -> list[str]:
    """Return one message, "path: fault", for each file that `folder` lacks or holds incomplete.

    A file must have its published size; a safetensors file also the length that its header promises; a JSON
    file without a published size must be readable. This needs no network and reads no weights.
    """
    return [f"{path}: {fault}" for path, fault in _faults(Path(folder), checkpoint).items()]


def download(
    checkpoint: PublishedCheckpoint, output_dir: str | Path = "models", source: str = "modelscope"
) -> Path:
    """Fetch the missing files of a checkpoint into output_dir/<its folder> and return that folder.

    A complete folder is left alone, and an unfinished download is resumed.

    Raises:
        ValueError: the source is no entry of `SOURCES`.
        DownloadError: the disk has too little space, the hub cannot be reached or its library is not
            installed, or files are still incomplete afterwards.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}; it must be one of: {', '.join(SOURCES)}")
    folder = Path(output_dir) / checkpoint.folder
    faults = _faults(folder, checkpoint)
    if not faults:
        logger.info("%s is complete in %s", checkpoint.name, folder)
        return folder
    _require_disk_space(folder, checkpoint, list(faults))
    logger.info("Fetching %d files of %s from %s into %s", len(faults), checkpoint.name, source, folder)
    _fetch(checkpoint, folder, list(faults), source)
    left = missing_files(folder, checkpoint)
    if left:
        raise DownloadError(_explain(checkpoint, folder, source, "still incomplete: " + "; ".join(left)))
    return folder


def _faults(folder: Path, checkpoint: PublishedCheckpoint) -> dict[str, str]:
    faults = {path: _fault(folder / path, size) for path, size in checkpoint.files.items()}
    return {path: fault for path, fault in faults.items() if fault is not None}


def _fault(path: Path, expected: int | None) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if expected is not None and size != expected:
        return f"{size:,} bytes, should be {expected:,}"
    if path.suffix == ".safetensors":
        return _safetensors_fault(path, size)
    if path.suffix == ".pth" and expected is None and not zipfile.is_zipfile(path):
        return f"{size:,} bytes, cut off or no PyTorch file"
    if path.suffix == ".json" and expected is None:
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return "not readable as JSON, perhaps cut off"
    return None


def _safetensors_fault(path: Path, size: int) -> str | None:
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > _MAX_SAFETENSORS_HEADER:
            return "not a safetensors file"
        if 8 + header_size > size:
            return f"{size:,} bytes, cut off within its header"
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + header_size + max(ends, default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            return "not a safetensors file"
    return None if size == promised else f"{size:,} bytes, its header promises {promised:,}"


def _require_disk_space(folder: Path, checkpoint: PublishedCheckpoint, paths: list[str]) -> None:
    # Both hubs keep unfinished files in a folder with a leading dot; that space is already paid for.
    unfinished = sum(file.stat().st_size for file in folder.glob(".*/**/*") if file.is_file())
    needed = sum(expected_bytes(checkpoint, path) for path in paths) - unfinished
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DownloadError(
            f"Too little disk space for {checkpoint.name}: {needed / 1e9:.1f} GB are still to come into "
            f"{folder}, {free / 1e9:.1f} GB are free there. Free some space or choose another output_dir."
        )


def _fetch(checkpoint: PublishedCheckpoint, folder: Path, paths: list[str], source: str) -> None:
    # allow_file_pattern: the one name that every ModelScope version knows.
    _site, package, errors, patterns = _HUBS[source]
    try:
        hub, kinds = import_module(package), vars(import_module(errors)).values()
    except ImportError as error:
        raise DownloadError(f"{package} is not installed: pip install {package}") from error
    # The errors of a hub have no base class in common in all of its versions.
    own = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))
    failures: list[type[BaseException]] = [OSError, *own]
    try:
        hub.snapshot_download(checkpoint.model_id, local_dir=str(folder), **{patterns: paths})
    except tuple(failures) as error:
        first_line = str(error).strip().split("\n")[0]
        reason = f"{type(error).__name__}: {first_line}"
        raise DownloadError(_explain(checkpoint, folder, source, reason)) from error


def _explain(checkpoint: PublishedCheckpoint, folder: Path, source: str, reason: str) -> str:
    target = shlex.quote(str(folder))
    return (
        f"Could not fetch {checkpoint.name} ({checkpoint.model_id} at {_HUBS[source][0]}) "
        f"into {folder}: {reason}\n"
        "What has arrived is kept, and the same command continues from there. Or fetch it by hand:\n"
        f"  modelscope download --model {checkpoint.model_id} --local_dir {target}\n"
        f"  hf download {checkpoint.model_id} --local-dir {target}"
    )


def expected_bytes(checkpoint: PublishedCheckpoint, path: str) -> int:
    """Return the bytes of a checkpoint's file; a shard of unknown size is an even share of the DiT."""
    size = checkpoint.files[path]
    if size is not None:
        return size
    if not path.endswith(".safetensors"):
        return checkpoint.about_bytes.get(path, 0)
    folder = Path(path).parent
    shards = [n for n in checkpoint.files if n.endswith(".safetensors") and Path(n).parent == folder]
    return 4 * checkpoint.num_parameters // len(shards)
