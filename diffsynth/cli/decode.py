"""`fastvmt decode`: make the video of final latents that an interrupted run left."""

import hashlib
import json
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffsynth.cli.console import DONE, Console
from diffsynth.configs.fields import fields_of
from diffsynth.configs.options import DEFAULT_FPS, TILING, FileOptions, RunOptions
from diffsynth.data import save_video
from diffsynth.data.files import sha256_of_file
from diffsynth.data.stream import video_damage
from diffsynth.jobs.decode import decode_saved
from diffsynth.jobs.errors import RunFailedError
from diffsynth.jobs.models import choose_model
from diffsynth.jobs.publish import check_free, check_place, write_output
from diffsynth.models.checkpoint_files import CheckpointError, files_of
from diffsynth.models.model_manager import ModelManager
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.runs.latents import HIDDEN, read_latents
from diffsynth.runs.record import metadata_comment
from diffsynth.vram_management import choose_device


def run(options: Namespace, console: Console) -> int:
    """Decode the latents with the model's VAE; its other parts are not loaded.

    Raises:
        UsageError: the output cannot be written.
        RunFailedError: the model has no whole VAE.
    """
    check_place(options.output)
    latents = options.latents
    hidden = latents.name.endswith(HIDDEN)  # what a killed run left: it goes once its video is there
    facts = {} if hidden and not latents.exists() else read_latents(latents)[1]
    folder = choose_model(options.model, options.models_dir, console.note)
    asked = vars(options)
    tiling = {name: asked[name] for name in TILING if name in asked}
    RunOptions(**tiling)
    file = fields_of(FileOptions, asked)
    source = latents.name if hidden else sha256_of_file(latents)
    asked_for = f"{source} {file} {tiling} {asked.get('vae_dtype')}"
    comment = f"fastvmt decode {hashlib.sha256(asked_for.encode()).hexdigest()}"
    there = options.output.is_file() and not options.overwrite
    before, _, made = metadata_comment(options.output).partition(": ") if there else ("", "", "")
    if before == comment:
        num_frames, height, width, fps = json.loads(made)
        if video_damage(options.output, (num_frames, height, width)) is None:
            console.say(f"{options.output} was made before by the same request")
            console.result({"output": str(options.output), "frames": num_frames, "fps": fps})
            return DONE
    check_free(options.output, options.overwrite)
    facts = facts or read_latents(latents)[1]  # which raises that there are none
    fps = file.fps or facts["fps"] or DEFAULT_FPS
    comment += f": {json.dumps([facts['num_frames'], facts['height'], facts['width'], fps])}"
    console.note("load the VAE")
    dtype = getattr(torch, asked.get("vae_dtype") or "float32")
    vae = load_vae(folder, choose_device(asked.get("device") or "auto"), dtype)
    console.note("decode")
    frames: Any = decode_saved(latents, vae, **tiling)  # PIL images by default
    console.note("write")
    kind: dict[str, Any] = {"fps": fps, "quality": file.quality, "lossless": file.lossless}
    save = partial(save_video, frames, ffmpeg_params=["-metadata", f"comment={comment}"], **kind)
    path = write_output(frames, options.output, save, options.overwrite)
    if hidden:
        latents.unlink(missing_ok=True)
    shown = f"{frames[0].width}x{frames[0].height}"
    console.say(f"{path}: {len(frames)} frames of {shown} at {fps:g} frames a second")
    console.result({"output": str(path), "frames": len(frames), "fps": fps})
    return DONE


def load_vae(folder: Path, device: torch.device, dtype: torch.dtype) -> WanVideoVAE:
    """Load the VAE of a checkpoint folder alone; RunFailedError if the folder has none that is whole."""
    manager = ModelManager(torch_dtype=dtype, device=device)
    try:
        # The VAE is the smallest file of the published checkpoints.
        for files in sorted(files_of(folder), key=lambda group: sum(file.stat().st_size for file in group)):
            manager.load_model(files)
            for loaded in manager.loaded:
                if isinstance(loaded.model, WanVideoVAE):
                    return loaded.model
    except (CheckpointError, FileNotFoundError) as error:
        raise RunFailedError(f"the model cannot be loaded: {error}") from error
    raise RunFailedError(f"{folder} holds no VAE")
