"""Final latents in a file, from which `fastvmt decode` makes the video."""

import logging
import shlex
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.state import load_state, save_state

logger = logging.getLogger(__name__)

KIND = "final latents"


def latents_facts(
    vae: WanVideoVAE, size: tuple[int, int, int], fps: float | None, cost: RunCost | None = None
) -> dict[str, Any]:
    """Return the facts that are saved with final latents."""
    facts = {"kind": KIND, **dict(zip(("num_frames", "height", "width"), size, strict=True))}
    costs = {} if cost is None else cost.state()
    return {**facts, "fps": fps, "vae": weights_fingerprint(vae), "cost": costs}


def decode_line(path: Path, output: Path | None = None) -> str:
    """Return words that say how a file of final latents becomes a video, the one that was asked for."""
    name = "OUT.mp4" if output is None or output.exists() else shlex.quote(str(output))
    return f"its final latents are kept: fastvmt decode {shlex.quote(str(path))} -o {name} makes it"


@contextmanager
def latents_until_done(path: Path, output: Path | None = None) -> Iterator[None]:
    """Remove the file of a run's final latents at the end of this context, unless Ctrl-C ends it."""
    try:
        yield
    except KeyboardInterrupt:
        if path.exists():
            logger.warning("there is no video, but %s", decode_line(path, output))
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


def keep_latents(
    latents: Tensor, facts: Mapping[str, object], error: BaseException, output: Path | None = None
) -> None:
    """Save final latents that are no video yet beside the one that was asked for, else among temporary files.

    The file becomes the `latents_path` of the error that prevented the video; None where none takes it.
    """
    kept = None
    folders, stem = ([], "fastvmt") if output is None else ([output.parent], output.stem)
    for folder in (*folders, Path(tempfile.gettempdir())):
        path = folder / f"{stem}-latents-{uuid.uuid4().hex[:8]}.safetensors"
        with suppress(OSError, ValueError):
            save_state(path, {"latents": latents}, facts)
            kept = path
            break
    error.latents_path = kept  # type: ignore[attr-defined]  # for callers
    if kept is not None:
        logger.error("there is no video (%s), but %s", error, decode_line(kept, output))


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
