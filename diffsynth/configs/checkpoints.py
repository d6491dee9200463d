"""The published Wan checkpoints: where they are, which files inference needs, and how they are run."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

# The models that come with the package, by name: beside it in a clone, inside it when installed from a wheel.
EMBEDDED = {"nano": "Wan2.1-T2V-nano", "nano-ti2v": "Wan2.2-TI2V-nano"}
_PACKAGE = Path(__file__).resolve().parent.parent
_EMBEDDED_IN = (_PACKAGE / "embedded", _PACKAGE.parent / "models")


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedCheckpoint:
    """One published checkpoint folder.

    Attributes:
        name: published name, "Wan2.1-T2V-1.3B".
        model_id: id on ModelScope and on Hugging Face.
        folder: default name of the folder below models/.
        files: path in the folder -> size in bytes; None if the file is checked by its content instead.
        num_parameters: number of parameters of a DiT, which is published in float32.
        dit_kwargs: arguments of `WanModel`.
        about_bytes: path -> rough size in bytes of a file that is no shard of a DiT.
        defaults: options and motion by mode that differ from those of `PUBLISHED_DEFAULTS`.
    """

    name: str
    model_id: str
    folder: str
    files: Mapping[str, int | None]
    num_parameters: int
    dit_kwargs: Mapping[str, Any]
    about_bytes: Mapping[str, int] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


_TABLE = json.loads(Path(__file__).with_name("published.json").read_text())
# Mean and deviation of the latents of the published VAEs, channel by channel, by the number of channels.
LATENT_STATISTICS: Mapping[int, tuple[tuple[float, ...], ...]] = MappingProxyType(
    {int(count): tuple(map(tuple, rows)) for count, rows in _TABLE["latent_statistics"].items()}
)
# Options with which the published text-to-video checkpoints are run unless the caller says otherwise.
PUBLISHED_DEFAULTS: Mapping[str, Any] = MappingProxyType(_TABLE["defaults_of_all"])
# For the sizes of the published checkpoints. Counted in full DiT forwards at 480x832x81 they cost 0.24
# and 0.12 of the published procedure.
PUBLISHED_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(_TABLE["presets"])


def _published(row: Mapping[str, Any]) -> PublishedCheckpoint:
    row, dit = dict(row), {**_TABLE["dit_of_all"], **row["dit_kwargs"]}
    dit["patch_size"] = tuple(dit["patch_size"])
    files = dict(row["files"])
    for folder, count in row.pop("shards", {}).items():
        shards = [f"-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        weights = (f"diffusion_pytorch_model{end}" for end in (*shards, ".safetensors.index.json"))
        files |= {folder + name: None for name in ("config.json", *weights)}
    place = {"model_id": f"Wan-AI/{row['name']}", "folder": row["name"]}
    files |= _TABLE["files_of_all"]
    return PublishedCheckpoint(**{**row, **place, "files": files, "dit_kwargs": dit})


PUBLISHED = MappingProxyType({key: _published(row) for key, row in _TABLE["checkpoints"].items()})


def published_key(name: str | Path) -> str | None:
    """Return the key in `PUBLISHED` of a name as people write it; None if it is none of them.

    "1.3B", "Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-1.3B" and "wan2.1-t2v-1.3b-diffusers" all name "1.3b".
    """
    last = Path(name).name.lower().removesuffix("-diffusers")
    return next((key for key, known in PUBLISHED.items() if last in (key, known.folder.lower())), None)


def checkpoint_folder(name: str | Path, root: str | Path = "models") -> Path:
    """Return the folder of a checkpoint.

    Args:
        name: an existing folder, a published name in any case, with or without its organisation on a hub
            ("1.3b", "Wan-AI/Wan2.1-T2V-14B"), the name of a folder in root, or that of an embedded model,
            "nano" or, for pictures, "nano-ti2v".
        root: folder that holds the published checkpoints.

    Raises:
        FileNotFoundError: the folder does not exist; the message says how to fetch it.
    """
    key, here = published_key(name), Path(root) / Path(name).name
    folders = [Path(name), here] if key is None else [Path(name), here, Path(root) / PUBLISHED[key].folder]
    wanted = str(name).lower()
    embedded = next((own for key, own in EMBEDDED.items() if wanted in (key, own.lower())), None)
    if embedded is not None:
        folders = [parent / embedded for parent in _EMBEDDED_IN]
    for folder in folders:
        if folder.is_dir():
            return folder
    if embedded is not None:
        searched = " nor ".join(map(str, folders))
        raise FileNotFoundError(
            f"the embedded model is missing: neither {searched} is there; install the package again"
        )
    if key is not None:
        where = "" if str(root) == "models" else f" --models-dir {root}"
        raise FileNotFoundError(f"{folders[-1]} does not exist; fetch it with: fastvmt download {key}{where}")
    names = ", ".join([*EMBEDDED, *PUBLISHED])
    raise FileNotFoundError(f"{name} is neither a checkpoint folder nor one of the names {names}")
