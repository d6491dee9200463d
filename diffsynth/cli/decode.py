"""`fastvmt decode`: the video of final latents that a run left when it was stopped or ran out of memory."""

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.options import DEFAULT_FPS, TILING, FileOptions, RunOptions
from diffsynth.data import save_video
from diffsynth.jobs.errors import RunFailedError
from diffsynth.jobs.models import choose_model
from diffsynth.jobs.publish import check_output, write_aside
from diffsynth.models.checkpoint_files import CheckpointError, files_of
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.pipelines.decode import decode_saved, read_latents_facts
from diffsynth.vram_management import choose_device

VAE = "wan_video_vae"


def run(options: Namespace, console: Console) -> int:
    """Decode the latents with the model's VAE; its other parts are not needed."""
    check_output(options.output, options.overwrite)
    facts = read_latents_facts(options.latents)
    folder = choose_model(options.model, options.models_dir, console.note)
    given = vars(options)
    tiling = {name: given[name] for name in TILING if name in given}
    RunOptions(**tiling)
    file = FileOptions(**{name: given[name] for name in ("fps", "quality") if name in given})
    console.note("load the VAE")
    dtype = getattr(torch, given.get("vae_dtype") or "float32")
    vae = load_vae(folder, choose_device(given.get("device") or "auto"), dtype)
    console.note("decode")
    frames = decode_saved(options.latents, vae, **tiling)
    console.note("write")
    fps = file.fps or facts["fps"] or DEFAULT_FPS
    save = partial(save_video, frames, fps=fps, quality=file.quality)
    path = write_aside(options.output, save, options.overwrite)
    size = f"{frames[0].width}x{frames[0].height}"
    console.say(f"{path}: {len(frames)} frames of {size} at {fps:g} frames a second")
    console.result({"output": str(path), "frames": len(frames), "fps": fps})
    return DONE


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> WanVideoVAE:
    """Load the VAE of a checkpoint folder alone.

    Raises:
        RunFailedError: the folder has none that is whole.
    """
    manager = ModelManager(torch_dtype=dtype, device=device)
    try:
        # The VAE is the smallest file of the published checkpoints.
        for files in sorted(files_of(folder), key=lambda group: sum(file.stat().st_size for file in group)):
            manager.load_model(files)
            if manager.loaded[-1].name == VAE:
                return manager.find(VAE).model
    except (CheckpointError, FileNotFoundError) as error:
        raise RunFailedError(f"the model cannot be loaded: {error}") from error
    raise RunFailedError(f"{folder} holds no VAE")
