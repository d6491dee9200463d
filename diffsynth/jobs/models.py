"""Which model a task uses, and how it is loaded."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from diffsynth.configs.checkpoints import PUBLISHED, checkpoint_folder
from diffsynth.configs.options import LoadOptions
from diffsynth.jobs.download import missing_files
from diffsynth.jobs.errors import RunFailedError
from diffsynth.models.attention import use_attention
from diffsynth.models.checkpoint_files import CheckpointError
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.vram_management import choose_device


def load_options(asked: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> LoadOptions:
    """Return how a model is loaded."""
    known = {item.name for item in fields(LoadOptions)}
    before = {} if recorded is None else recorded
    if unknown := sorted(before.keys() - known):
        raise ValueError(f"the record's setup has {', '.join(unknown)}, which is unknown here")
    options = {**before, **{name: asked[name] for name in known if asked.get(name) is not None}}
    return LoadOptions(**{**options, "loras": dict(options["loras"]) if options.get("loras") else None})


def attention_kernel(options: LoadOptions) -> AbstractContextManager[None]:
    """Return a context in which the chosen attention kernel is used."""
    return nullcontext() if options.attention is None else use_attention(options.attention)


def choose_model(
    name: str | None,
    root: str | Path,
    note: Callable[[str], None],
    options: LoadOptions | None = None,
    *,
    picture: bool = False,
) -> Path:
    """Return the folder of a model that is named as for `from_pretrained`.

    Without a name it is the DiT's folder if the options name all three models; else, and `note` is told so,
    that of the largest complete published model below root, else of an embedded one: of those that take a
    picture if there is one, else of those that need none.

    Raises:
        FileNotFoundError: there is no model of this name.
    """
    if options is not None and options.device is not None:
        choose_device(options.device)  # what is wrong with it comes before the note
    if name is not None:
        return checkpoint_folder(name, root)
    if options is not None and options.dit is not None and len(parts_of(options)) == 3:
        return Path(options.dit) if Path(options.dit).is_dir() else Path(options.dit).parent
    for key, checkpoint in sorted(PUBLISHED.items(), key=lambda item: -item[1].num_parameters):
        folder, dit = Path(root) / checkpoint.folder, checkpoint.dit_kwargs
        needs = dit["in_dim"] != dit["out_dim"]
        fits = needs or dit.get("has_clean_first_frame", False) if picture else not needs
        if fits and folder.is_dir() and not missing_files(folder, checkpoint):
            note(f"model: {key}, the largest complete one below {root} (--model chooses another)")
            return folder
    embedded, kind, other = (
        ("nano-ti2v", " for pictures", "wan2.2-ti2v-5b") if picture else ("nano", "", "1.3b")
    )
    note(
        f"model: {embedded}, the bundled demo model{kind} (64x64 pixels, 17 frames; shapes and emoji, while "
        "photographs and real clips need a published model), since no checkpoint"
        f"{kind} below {root} is complete; fetch one with: fastvmt download {other}"
    )
    return checkpoint_folder(embedded)


def parts_of(options: LoadOptions) -> dict[str, str]:
    """Return the weights that are loaded instead of the checkpoint's, by name of the model."""
    parts = {"dit": options.dit, "text_encoder": options.text_encoder, "vae": options.vae}
    return {name: file for name, file in parts.items() if file is not None}


def load_pipeline(folder: Path, options: LoadOptions) -> WanVideoPipeline:
    """Load the pipeline of a checkpoint; RunFailedError if its weights are damaged or incomplete."""
    dtypes = {"torch_dtype": options.dtype, "vae_dtype": options.vae_dtype}
    chosen: dict[str, Any] = {
        name: getattr(torch, dtype) for name, dtype in dtypes.items() if dtype is not None
    }
    chosen |= parts_of(options)
    try:
        pipe = WanVideoPipeline.from_pretrained(
            folder, device=options.device or "auto", loras=options.loras, **chosen
        )
    except (CheckpointError, FileNotFoundError) as error:
        raise RunFailedError(f"the model cannot be loaded: {error}") from error
    if options.persistent is not None:
        pipe.enable_vram_management(num_persistent_param_in_dit=options.persistent)
    elif options.offload:
        pipe.enable_cpu_offload()
    pipe.residency.settled |= options.offload is False
    if options.compile:
        pipe.enable_compile()
    return pipe
