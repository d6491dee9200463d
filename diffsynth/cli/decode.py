"""`fastvmt decode`: the video of final latents that a run left when it was stopped or ran out of memory."""

from argparse import Namespace
from pathlib import Path

import torch

from diffsynth.cli.console import Console
from diffsynth.cli.errors import DONE, RunFailedError
from diffsynth.cli.models import choose_model
from diffsynth.cli.outputs import check_output, publish_plain
from diffsynth.cli.tasks import DEFAULT_FPS
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
    folder = choose_model(options.model, options.models_dir, console)
    console.note("load the VAE")
    vae = load_vae(folder, choose_device(options.device), getattr(torch, options.vae_dtype))
    console.note("decode")
    tiling = {"tile_size": options.tile_size, "tile_stride": options.tile_stride}
    frames = decode_saved(options.latents, vae, tiled=options.tiled, **tiling)
    console.note("write")
    fps = options.fps or facts["fps"] or DEFAULT_FPS
    path = publish_plain(
        frames, options.output, fps=fps, quality=options.quality, overwrite=options.overwrite
    )
    size = f"{frames[0].width}x{frames[0].height}"
    console.say(f"{path}: {len(frames)} frames of {size} at {fps:g} frames a second")
    console.result({"output": str(path), "frames": len(frames), "fps": fps})
    return DONE


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> WanVideoVAE:
    """The VAE of a checkpoint folder alone. Raises RunFailedError if the folder has none that is whole."""
    manager = ModelManager(torch_dtype=dtype, device=device)
    try:
        # The VAE is the smallest file of the published checkpoints.
        for files in sorted(files_of(folder), key=lambda group: sum(file.stat().st_size for file in group)):
            manager.load_model(files)
            if manager.loaded[-1].name == VAE:
                return manager.fetch_model(VAE)
    except (CheckpointError, FileNotFoundError) as error:
        raise RunFailedError(f"the model cannot be loaded: {error}") from error
    raise RunFailedError(f"{folder} holds no VAE")
