"""Which model a command uses, and how it is loaded."""

from argparse import Namespace
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffsynth.cli.console import Console
from diffsynth.cli.errors import RunFailedError
from diffsynth.configs.checkpoints import PUBLISHED, checkpoint_folder
from diffsynth.configs.download import missing_files
from diffsynth.models.attention import use_attention
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.pipelines.wan_video import WanVideoPipeline


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How a model is loaded and run; None for the pipeline's own choice. Goes into the record.

    persistent: parameters of the DiT that stay on the device while its other blocks stream. loras: files that
    are merged into the DiT, each with its strength.
    """

    device: str | None = None
    dtype: str | None = None
    vae_dtype: str | None = None
    attention: str | None = None
    compile: bool | None = None
    offload: bool | None = None
    persistent: int | None = None
    loras: Mapping[str, float] | None = None

    @classmethod
    def from_options(cls, options: Namespace, recorded: Mapping[str, Any] | None = None) -> "Setup":
        """What the command line says, and where it says nothing, a record."""
        before = {} if recorded is None else recorded
        unknown = before.keys() - set(cls.__dataclass_fields__)
        if unknown:
            raise ValueError(f"the record's setup has {', '.join(sorted(unknown))}, which is unknown here")
        given = {name: getattr(options, name) for name in cls.__dataclass_fields__}
        given["loras"] = dict(options.loras) if options.loras else None
        return cls(**{name: before.get(name) if value is None else value for name, value in given.items()})

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    def attention_kernel(self) -> AbstractContextManager[None]:
        """A context in which the chosen attention kernel is used."""
        return nullcontext() if self.attention is None else use_attention(self.attention)


def choose_model(name: str | None, root: str | Path, console: Console) -> Path:
    """The folder of the model that is asked for; without a name the largest complete one below root, else
    nano, and a note says which. Raises FileNotFoundError for a name that is not there.
    """
    if name is not None:
        return checkpoint_folder(name, root)
    for key, checkpoint in reversed(PUBLISHED.items()):
        folder = Path(root) / checkpoint.folder
        if folder.is_dir() and not missing_files(folder, checkpoint):
            console.note(f"model: {key}, the largest complete one below {root} (--model chooses another)")
            return folder
    console.note(
        "model: nano, the small one that comes along (64x64 pixels, 17 frames); no complete checkpoint is "
        f"below {root}; fetch one with: fastvmt download {next(iter(PUBLISHED))}"
    )
    return checkpoint_folder("nano")


def is_published(folder: Path) -> bool:
    """Whether a folder is named like a published checkpoint, and so made for 480x832 pixels and 81 frames."""
    return folder.resolve().name in {checkpoint.folder for checkpoint in PUBLISHED.values()}


def load_pipeline(folder: Path, setup: Setup) -> WanVideoPipeline:
    """The pipeline of a checkpoint. Raises RunFailedError for damaged or incomplete weights."""
    dtypes = {"torch_dtype": setup.dtype, "vae_dtype": setup.vae_dtype}
    chosen = {name: getattr(torch, dtype) for name, dtype in dtypes.items() if dtype is not None}
    try:
        pipe = WanVideoPipeline.from_pretrained(
            folder, device=setup.device or "auto", loras=setup.loras, **chosen
        )
    except (CheckpointError, FileNotFoundError) as error:
        raise RunFailedError(f"the model cannot be loaded: {error}") from error
    if setup.persistent is not None:
        pipe.enable_vram_management(num_persistent_param_in_dit=setup.persistent)
    elif setup.offload:
        pipe.enable_cpu_offload()
    if setup.compile:
        pipe.enable_compile()
    return pipe
