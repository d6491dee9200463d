"""Latents to frames: at the end of a run, or later from a file of final latents."""

import logging
import shlex
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import chunks_to_uint8, finite
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.components import Components
from diffsynth.planning.ladder import Ladder, memory_problem
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state, save_state

logger = logging.getLogger(__name__)

Frames = list[Image.Image] | np.ndarray | Tensor
KIND = "final latents"


def decode_latents(models: Components, latents: Tensor, options: RunOptions) -> Frames:
    """Decode clean latents [1, C, F, h, w] to a video of options.output_type.

    Raises:
        RuntimeError: a latent is not finite.
    """
    finite(latents, f"denoising (DiT in {models.dit.dtype})")
    if options.output_type == "latent":
        return latents
    with models.residency.using("vae"):
        return decode_frames(models.vae, latents, options)


def decode_frames(vae: WanVideoVAE, latents: Tensor, options: RunOptions) -> Frames:
    """Decode finite latents [1, C, F, h, w] to a video of options.output_type: "pil", "np" or "pt"."""
    decoder = f"the VAE's decoder (in {vae.dtype})"
    if options.output_type == "pt":
        return finite(vae.decode(latents, num_frames=options.num_frames, **options.tiling), decoder)
    if options.tiled:
        video = vae.decode(latents, num_frames=options.num_frames, **options.tiling)
        chunks: Iterable[Tensor] = video.split(vae.temporal_factor, dim=2)
    else:
        chunks = vae.decode_chunks(latents)
    frames = chunks_to_uint8((finite(chunk, decoder) for chunk in chunks), options.num_frames)
    return frames if options.output_type == "np" else [Image.fromarray(frame) for frame in frames]


def latents_facts(vae: WanVideoVAE, options: RunOptions, fps: float | None, cost: RunCost) -> dict[str, Any]:
    """Return the facts that are saved with final latents: the options that decoding needs, and the cost.

    Args:
        fps: frames a second of the reference; None if unknown.
    """
    return {
        "kind": KIND,
        "num_frames": options.num_frames,
        "height": options.height,
        "width": options.width,
        "fps": fps,
        "vae": weights_fingerprint(vae),
        "cost": cost.state(),
    }


def keep_latents(
    latents: Tensor, facts: Mapping[str, object], folders: Iterable[Path], stem: str, error: BaseException
) -> None:
    """Save final latents that are no video yet, in the first folder that takes them.

    Args:
        latents: [1, C, F, h, w].
        facts: see `latents_facts`.
        folders: those to try, before the system's folder for temporary files.
        stem: how the file's name begins.
        error: why there is no video; its `latents_path` becomes the file, or None where none takes it.
    """
    kept = None
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = folder / f"{stem}-{uuid.uuid4().hex[:8]}.safetensors"
        with suppress(OSError, ValueError):
            save_state(path, {"latents": latents}, facts)
            kept = path
            break
    error.latents_path = kept  # type: ignore[attr-defined]  # for callers
    if kept is not None:
        line = f"fastvmt decode {shlex.quote(str(kept))} -o OUT.mp4"
        logger.error("there is no video (%s), but its final latents are kept: %s makes it", error, line)


def read_latents_facts(path: str | Path) -> Mapping[str, Any]:
    """Return the `latents_facts` in a file of final latents.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind.
    """
    return _read(path)[1]


@torch.no_grad()
def decode_saved(
    path: str | Path,
    vae_or_pipe: Any,
    tiled: bool = True,
    *,
    tile_size: tuple[int, int] = (30, 52),
    tile_stride: tuple[int, int] = (15, 26),
    output_type: str = "pil",
) -> Frames:
    """Decode final latents that a run saved in its checkpoint_dir. If memory runs out, tiles get smaller.

    A warning is logged if the VAE has other weights or another dtype than that of the run.

    Args:
        vae_or_pipe: a `WanVideoVAE`, or a pipeline whose VAE is used.
        tiled: decode in spatial tiles of tile_size and tile_stride, (rows, columns) in latent units.
        output_type: "pil", "np" or "pt", as in the pipeline's call.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind, or the VAE has other sizes.
    """
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be one of pil, np, pt; got {output_type!r}")
    latents, facts = _read(path)
    models = None if isinstance(vae_or_pipe, WanVideoVAE) else vae_or_pipe.models
    vae = vae_or_pipe if models is None else models.vae
    pixels = tuple(n * vae.spatial_factor for n in latents.shape[3:])
    if latents.shape[1] != vae.z_dim or pixels != (facts["height"], facts["width"]):
        raise ValueError(
            f"{path} holds latents {tuple(latents.shape)} of {facts['height']} x {facts['width']} pixels; "
            f"the VAE has {vae.z_dim} channels and {vae.spatial_factor} pixels a latent"
        )
    if weights_fingerprint(vae) != facts["vae"]:
        logger.warning("%s was made with a VAE of other weights or another type", path)
    options = RunOptions(
        **{name: facts[name] for name in ("height", "width", "num_frames")},
        output_type=output_type,
        tiled=tiled,
        tile_size=tile_size,
        tile_stride=tile_stride,
    )
    ladder = Ladder(None if models is None else models.residency, vae)
    while True:
        try:
            if models is None:
                return decode_frames(vae, latents, options)
            return decode_latents(models, latents, options)
        except (RuntimeError, MemoryError) as error:
            problem = memory_problem(error)
        options = ladder.next("decode", options, problem)


def _read(path: str | Path) -> tuple[Tensor, Mapping[str, Any]]:
    state, facts = load_state(Path(path))
    if facts.get("kind") != KIND:
        raise ValueError(f"{path} holds no final latents, but another part of a run")
    return state["latents"], facts
