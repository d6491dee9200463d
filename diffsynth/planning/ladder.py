"""The ladder of settings in a run: where it begins, and the next rung when memory runs out.

The stage that failed is done again from its beginning, denoising from its last finished step, so that no
finished step is lost; what was changed stays changed for the rest of the run.
"""

import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch

from diffsynth.configs.options import TILING, RunOptions
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.memory import guided_pass_bytes, sampling_pass_bytes
from diffsynth.planning.plan import GB, plan_run
from diffsynth.planning.settings import Settings, following, keeping
from diffsynth.planning.sizes import ModelSizes
from diffsynth.vram_management import Residency, available_memory, device_memory

logger = logging.getLogger(__name__)

# Share of the free memory that guidance may fill, and of a device's memory for both prompts in one call.
FILL, FILL_BY_BOTH = 0.6, 0.7
# How PyTorch words it apart from its own exception: CPU, cuBLAS, cuDNN, a kernel's launch.
ALLOCATION_FAILED = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")
_OF_OPTIONS = ("batch_cfg", *TILING)
HELP = {
    "encode text": "a text encoder in bfloat16, or device='cpu'",
    "encode video": "a lower height and width, or fewer num_frames",
    "guidance": "motion with coarse=2 or an earlier block, a lower height and width, or fewer num_frames",
    "sampling": "a lower height and width, fewer num_frames, or torch_dtype=torch.float8_e4m3fn",
    "decode": "decode_saved on a machine with more memory (see checkpoint_dir), or output_type='latent'",
}


class MemoryRanOutError(RuntimeError):
    """Memory ran out in a stage that has nothing left to give up."""


def settings_of(options: RunOptions) -> dict[str, Any]:
    """Return the options that the ladder may change, as JSON holds them."""
    checkpoint = None if options.motion is None else options.motion.checkpoint
    return {**{name: getattr(options, name) for name in _OF_OPTIONS}, "checkpoint": checkpoint}


def with_settings(options: RunOptions, settings: Mapping[str, Any]) -> RunOptions:
    """Return options with those of `settings_of` put back."""
    motion = options.motion and replace(options.motion, checkpoint=settings["checkpoint"])
    return replace(options, motion=motion, **{name: settings[name] for name in _OF_OPTIONS})


class Ladder:
    """The settings of one run.

    Args:
        residency: where the models of a pipeline are; None for a VAE alone.
        vae: the VAE.
    """

    def __init__(self, residency: Residency | None, vae: WanVideoVAE) -> None:
        self._residency, self._vae = residency, vae
        self._device = vae.device if residency is None else residency.device
        self._given_up: list[str] = []

    def begin(self, options: RunOptions, vram_gb: float | None, *, with_reference: bool) -> RunOptions:
        """Return the options of a run with all settings decided; with a budget, models are placed, too.

        Args:
            options: as resolved.
            vram_gb: memory of the device that the run may use, GB of 2**30 bytes; None for what is free, with
                models where they are.
            with_reference: whether a video is encoded.

        Raises:
            NotEnoughMemoryError: no settings fit into vram_gb.
        """
        assert self._residency is not None, "a run has a whole pipeline"
        sizes = ModelSizes.of(self._residency.models)
        if vram_gb is not None:
            plan = plan_run(sizes, options, vram_gb=vram_gb, with_reference=with_reference)
            logger.info("planned for %s GB:\n%s", vram_gb, plan)
            plan.settings.place(self._residency)
            return with_settings(options, _changes(plan.settings, options))
        motion = options.motion
        if motion is not None and motion.checkpoint == "auto":
            options = replace(options, motion=replace(motion, checkpoint=self._kept(sizes, options)))
        if options.batch_cfg is None:
            options = replace(options, batch_cfg=self._both_fit(sizes, options))
        return options if options.tiled is not None else replace(options, tiled=True)

    def next(self, stage: str, options: RunOptions, problem: str) -> RunOptions:
        """Return the options of the next rung for a stage, after one warning; models are placed accordingly.

        Args:
            stage: in which memory ran out.
            options: with which it did.
            problem: from `memory_problem`.

        Raises:
            MemoryRanOutError: no rung is left; the message says what there is and what helps.
        """
        gc.collect()
        torch.cuda.empty_cache()
        now = self._settings(options)
        below = following(
            stage,
            now,
            accelerator=self._residency is not None and self._device.type != "cpu",
            num_blocks=0
            if self._residency is None
            else len(cast(WanModel, self._residency.models["dit"]).blocks),
            picture=(options.height // self._vae.spatial_factor, options.width // self._vae.spatial_factor),
        )
        words, settings = next(below, ("", None))
        if settings is None:
            raise MemoryRanOutError(self._explanation(stage, problem))
        self._given_up.append(words)
        logger.warning("memory ran out in the stage %r: %s from now on (%s)", stage, words, problem)
        placement = ("offload", "resident_blocks", "stream_text_encoder")
        if self._residency is not None and any(getattr(settings, n) != getattr(now, n) for n in placement):
            settings.place(self._residency)
        return with_settings(options, _changes(settings, options))

    def _settings(self, options: RunOptions) -> Settings:
        """The settings in force: those of the options, and where the models are."""
        streaming = () if self._residency is None else self._residency.streaming
        return Settings(
            checkpoint=options.motion.checkpoint if options.motion else "none",
            batch_cfg=bool(options.batch_cfg) and options.cfg_scale != 1,
            **{**options.tiling, "tiled": options.tiled is not False},
            offload=self._residency is not None and self._residency.offload,
            resident_blocks=0 if "dit" in streaming else None,
            stream_text_encoder="text_encoder" in streaming,
        )

    def _kept(self, sizes: ModelSizes, options: RunOptions) -> str:
        """The first that fits of what guidance may keep; on a CPU, moving it to the CPU gains nothing."""
        motion = options.motion
        latents = sizes.latent_shape(options.height, options.width, options.num_frames)
        if motion is None:
            return keeping(None)[-1]
        kept = keeping(motion)[: 2 if self._device.type == "cpu" else None]
        free = FILL * available_memory(self._device)
        fits = (name for name in kept if guided_pass_bytes(sizes.dit, latents, motion, name) <= free)
        return next(fits, kept[-1])

    def _both_fit(self, sizes: ModelSizes, options: RunOptions) -> bool:
        """Return whether both prompts share a call of the DiT; on a CPU that gains nothing.

        Judged by the device's total memory, not by what is free, so that one machine always decides, and
        rounds, alike.
        """
        latents = sizes.latent_shape(options.height, options.width, options.num_frames)
        taken = sizes.dit.weights.total + sampling_pass_bytes(sizes.dit, latents, options, batch=2)
        return taken < FILL_BY_BOTH * device_memory(self._device)

    def _explanation(self, stage: str, problem: str) -> str:
        total, free = (n / GB for n in (device_memory(self._device), available_memory(self._device)))
        memory = f"{self._device} has {f'{total:.1f} GiB, ' if total else ''}{free:.1f} GiB free"
        tried = f"; tried: {', '.join(self._given_up)}" if self._given_up else ""
        happened = f"memory ran out in the stage {stage!r} ({problem}); {memory}{tried}"
        return f"{happened}. What helps: {HELP[stage]}"


def memory_problem(error: BaseException) -> str:
    """Return the first line of an error that says that memory ran out. Raises any other error itself."""
    if not is_out_of_memory(error):
        raise error
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be had, on an accelerator or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)


def _changes(settings: Settings, options: RunOptions) -> dict[str, object]:
    """Return the options that settings decide, named as in `settings_of`."""
    chosen = {name: getattr(settings, name) for name in _OF_OPTIONS}
    if options.cfg_scale == 1:
        chosen["batch_cfg"] = options.batch_cfg
    return {**chosen, "checkpoint": settings.checkpoint}
