"""Final latents in a file, from which `fastvmt decode` makes the video."""

import logging
import shlex
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state, save_state

logger = logging.getLogger(__name__)

KIND = "final latents"


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


def read_latents(path: str | Path) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the latents [1, C, F, h, w] in a file, and their `latents_facts`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged or of another kind.
    """
    state, facts = load_state(Path(path))
    if facts.get("kind") != KIND:
        raise ValueError(f"{path} holds no final latents, but another part of a run")
    return state["latents"], facts
