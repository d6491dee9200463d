"""SHA-256 of files and frames: a run's record tells by it whether what it was made from is still the same.

Hashes of large files are remembered by size and time of change in a small file in the user's cache folder.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from diffsynth.models.checkpoint_files import files_of

logger = logging.getLogger(__name__)

CHUNK = 1 << 22  # bytes
# A file that changed so lately may change again within the clock's resolution; its hash is not remembered.
SETTLED_AFTER = 2.0  # seconds
_TOKENIZER_FILES = ("*.json", "spiece.model")


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint folder that decide what it computes: weights, configs, tokenizer; sorted."""
    weights = {file for group in files_of(folder) for file in group}
    others = {file for pattern in _TOKENIZER_FILES for file in folder.rglob(pattern)}
    hidden = {file for file in others if any(part.startswith(".") for part in file.relative_to(folder).parts)}
    return sorted(weights | (others - hidden))


def sha256_of_files(files: Iterable[Path]) -> dict[Path, str]:
    """The hash of each file, remembered ones without reading them. Raises OSError for an unreadable file."""
    remembered = _load_remembered()
    known = dict(remembered)
    hashes = {}
    for file in files:
        place, facts = str(file.resolve()), file.stat()
        state = [facts.st_size, facts.st_mtime_ns]
        if known.get(place, {}).get("state") != state:
            known[place] = {"state": state, "sha256": _sha256(file)}
        hashes[file] = known[place]["sha256"]
        if time.time() - facts.st_mtime < SETTLED_AFTER:
            del known[place]
    if known != remembered:
        _store_remembered(known)
    return hashes


def sha256_of_video(path: Path) -> str:
    """The hash of a video file, or of a folder's images: of their names and contents, in order of name."""
    if path.is_file():
        return _sha256(path)
    digest = hashlib.sha256()
    for file in sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")):
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def sha256_of_frames(frames: Sequence[Image.Image]) -> str:
    """The hash of the pixels of frames and their sizes."""
    digest = hashlib.sha256()
    for frame in frames:
        pixels = np.ascontiguousarray(frame.convert("RGB"))
        digest.update(f"{pixels.shape} ".encode())
        digest.update(pixels)
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def remembered_hashes_file() -> Path:
    """Where hashes are remembered: fastvmt/sha256.json in XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvmt" / "sha256.json"


def _load_remembered() -> dict[str, dict]:
    try:
        known = json.loads(remembered_hashes_file().read_text())
    except (OSError, ValueError):
        return {}
    good = isinstance(known, dict) and all(isinstance(entry, dict) for entry in known.values())
    return {place: entry for place, entry in known.items() if "sha256" in entry} if good else {}


def _store_remembered(known: dict[str, dict]) -> None:
    file = remembered_hashes_file()
    temporary = file.with_name(f".{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({place: known[place] for place in known if Path(place).exists()}))
        temporary.replace(file)
    except OSError as error:
        logger.info("hashes are not remembered: %s", error)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
