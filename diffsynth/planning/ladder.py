"""The ladder of memory settings: each rung needs less memory than the one above, mostly at a loss of speed.

A run begins on a chosen rung, and moves down one when memory runs out in a stage. That stage is repeated;
denoising resumes after its last finished step. The new settings apply for the rest of the run.
"""

import gc
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar, cast

import torch

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import TILING, RunOptions
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.memory import decode_bytes, encode_bytes, guided_pass_bytes, sampling_pass_bytes
from diffsynth.planning.plan import GB, NotEnoughMemoryError, plan_run
from diffsynth.planning.settings import KEEPING, Settings, following, keeping
from diffsynth.planning.sizes import ModelSizes
from diffsynth.vram_management import Residency, available_memory, device_memory
from diffsynth.vram_management.streaming import alike, tensors_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Largest share of free memory for guidance, and of total memory for both prompts in one DiT call.
FILL, FILL_BY_BOTH = 0.6, 0.7
# Messages of failed allocations that raise other errors: CPU, cuBLAS, cuDNN, driver, Triton; in lower case.
ALLOCATION_FAILED = ("can't allocate memory", "alloc_failed", "allocation_failed", "out of memory")
# cuDNN's messages if no algorithm's workspace fits into memory, or if no algorithm supports an operation.
NO_ALGORITHM = ("unable to find a valid cudnn algorithm", "unable to find an engine to execute")
FULL = 0.1  # share of device memory; if less is free, NO_ALGORITHM means that memory ran out
_OF_OPTIONS = ("batch_cfg", *TILING)
HELP = {
    "encode text": "a text encoder in bfloat16, or device='cpu'",
    "encode video": "a lower height and width, or fewer num_frames",
    "guidance": "motion with coarse=2 or an earlier block, a lower height and width, or fewer num_frames",
    "sampling": "a lower height and width, fewer num_frames, or torch_dtype=torch.float8_e4m3fn",
    "decode": "decode_saved on a machine with more memory (see checkpoint_dir), or output_type='latent'",
}


class MemoryRanOutError(RuntimeError):
    """Raised when memory runs out in a stage and no setting that needs less can be taken any more."""

    rung: Mapping[str, Any] | None = None  # settings that need less, with which all ranks may start again


def settings_of(options: RunOptions) -> dict[str, Any]:
    """Return the options that the ladder may change, as values that JSON can store."""
    checkpoint = None if options.motion is None else options.motion.checkpoint
    return {**{name: getattr(options, name) for name in _OF_OPTIONS}, "checkpoint": checkpoint}


def with_settings(options: RunOptions, settings: Mapping[str, Any]) -> RunOptions:
    """Return options with the values from `settings_of` restored."""
    motion = options.motion and replace(options.motion, checkpoint=settings["checkpoint"])
    return replace(options, motion=motion, **{name: settings[name] for name in _OF_OPTIONS})


class Ladder:
    """Chooses the memory settings of one run, or of a VAE alone, and lowers them when memory runs out."""

    def __init__(self, residency: Residency | None, vae: WanVideoVAE) -> None:
        self._residency = residency or Residency({"vae": vae}, vae.device)
        self._vae, self._device = vae, self._residency.device
        self._given_up: list[str] = []
        self._dit = cast(WanModel | None, self._residency.models.get("dit"))
        self._spread = getattr(self._dit, "spread", None)

    def begin(self, options: RunOptions, vram_gb: float | None, *, with_reference: bool) -> RunOptions:
        """Return the options of a run with all settings decided.

        If vram_gb is given, or not all models fit into the free memory of an accelerator, they also move.

        Raises:
            NotEnoughMemoryError: no settings fit into vram_gb.
        """
        sizes = ModelSizes.of(self._residency.models)
        if vram_gb is not None:
            if device_memory(self._device):
                vram_gb = min(vram_gb, self._free_for_run() / GB)
            plan = plan_run(sizes, options, vram_gb=vram_gb, with_reference=with_reference)
            logger.info("planned for %.1f GB:\n%s", vram_gb, plan)
            plan.settings.place(self._residency)
            options = with_settings(options, _changes(plan.settings, options))
        if options.batch_cfg is None:
            options = replace(options, batch_cfg=self._both_fit(sizes, options))
        if options.tiled is None:
            options = replace(options, tiled=self._in_tiles(sizes, options))
        placed = vram_gb is not None or self._residency.settled or self._spread is not None
        if device_memory(self._device) and not placed:
            options = self._placed(sizes, options, with_reference)
        motion = options.motion
        if motion is not None and motion.checkpoint == "auto":
            options = replace(options, motion=replace(motion, checkpoint=self._kept(sizes, options, motion)))
        return with_settings(options, self._spread.agreed(settings_of(options))) if self._spread else options

    def lowered(self, options: RunOptions) -> RunOptions:
        """Return options on the rung that ranks have started again for, if there is one."""
        rung = getattr(self._spread, "rung", None)
        return options if rung is None else self._on(Settings(**rung), options)

    def run(
        self, stage: str, attempt: Callable[[RunOptions], T], options: RunOptions
    ) -> tuple[T, RunOptions]:
        """Attempt a stage, and repeat it one rung down each time that memory runs out.

        Returns:
            The stage's result, and the options in force afterwards.
        """
        while True:
            try:
                return attempt(options), options
            except (RuntimeError, MemoryError) as error:
                problem = memory_problem(error)
            options = self.next(stage, options, problem)

    def next(self, stage: str, options: RunOptions, problem: str) -> RunOptions:
        """Return the options of the next rung for a stage; this logs a warning and moves models if needed.

        Raises:
            MemoryRanOutError: no rung is left, or all ranks must take it; the message says what helps.
        """
        gc.collect()
        torch.cuda.empty_cache()
        now = self._settings(options)
        below = following(
            stage,
            now,
            accelerator=self._dit is not None and self._device.type != "cpu" and not self._residency.staying,
            num_blocks=0 if self._dit is None else len(self._dit.blocks),
            picture=(options.height // self._vae.spatial_factor, options.width // self._vae.spatial_factor),
        )
        words, settings = next(below, ("", None))
        if settings is None:
            raise MemoryRanOutError(self._explanation(stage, problem))
        if self._spread is not None:  # other ranks are in the middle of the stage
            where = f"on a rank in the stage {stage!r} ({problem})"
            error = MemoryRanOutError(f"memory ran out {where}; if started again, it continues, and {words}")
            error.rung = asdict(settings)
            raise error
        self._given_up.append(words)
        logger.warning("memory ran out in the stage %r: %s from now on (%s)", stage, words, problem)
        return self._on(settings, options)

    def _on(self, settings: Settings, options: RunOptions) -> RunOptions:
        """Return options with these settings, and move models that they place elsewhere."""
        now, placement = self._settings(options), ("offload", "resident_blocks", "stream_text_encoder")
        if any(getattr(settings, n) != getattr(now, n) for n in placement):
            settings.place(self._residency)
            self._residency.settled = True  # the plan of the next run would be as wrong
        return with_settings(options, _changes(settings, options))

    def _placed(self, sizes: ModelSizes, options: RunOptions, with_reference: bool) -> RunOptions:
        """Place the models by a plan for the free memory; return the options as given if all models fit."""
        models: Any = self._residency.models
        if not (alike(models["dit"].blocks) and alike(models["text_encoder"].encoder.block)):
            return options  # a plan may stream blocks
        free = self._free_for_run()
        try:
            plan = plan_run(sizes, options, vram_gb=free / GB, with_reference=with_reference)
        except NotEnoughMemoryError as error:
            logger.info("no plan fits, so that memory may run out: %s", error)
            return options
        plan.settings.place(self._residency)
        if not plan.settings.offload:
            return options
        whole = plan_run(sizes, options, with_reference=with_reference).peak / GB
        facts = (self._device, free / GB, whole, plan.settings)
        logger.warning("%s has %.1f GB free, and the fastest settings take %.1f; chosen: %s", *facts)
        return with_settings(options, _changes(plan.settings, options))

    def _free_for_run(self) -> int:
        """Return the bytes of the device that are free (others may use it, too) or held by the models."""
        weights = [t for model in self._residency.models.values() for t in tensors_of(model)]
        held = sum(t.nbytes for t in weights if t.device.type == self._device.type)
        return available_memory(self._device) + held

    def _settings(self, options: RunOptions) -> Settings:
        """Return the settings in force, from the options and from where the models are."""
        streaming = self._residency.streaming
        return Settings(
            checkpoint=options.motion.checkpoint if options.motion else "none",
            batch_cfg=bool(options.batch_cfg) and options.cfg_scale != 1,
            **{**options.tiling, "tiled": options.tiled is not False},
            offload=self._residency.offload,
            resident_blocks=0 if "dit" in streaming else None,
            stream_text_encoder="text_encoder" in streaming,
        )

    def _kept(self, sizes: ModelSizes, options: RunOptions, motion: MotionGuidance) -> str:
        """Return the first `checkpoint` setting that fits; not "offload" on a CPU, where it gains nothing."""
        latents = sizes.latent_shape(options.height, options.width, options.num_frames)
        kept = keeping(motion)[: KEEPING.index("offload") if self._device.type == "cpu" else None]
        free = FILL * available_memory(self._device) * getattr(self._spread, "size", 1)  # a share on each
        fits = (name for name in kept if guided_pass_bytes(sizes.dit, latents, motion, name) <= free)
        return next(fits, kept[-1])

    def _both_fit(self, sizes: ModelSizes, options: RunOptions) -> bool:
        """Return whether both prompts share a DiT call; total memory decides, so that reruns round alike."""
        if self._spread is not None and self._spread.mesh.prompts is not None:
            return True  # each half of the ranks takes one prompt
        latents = sizes.latent_shape(options.height, options.width, options.num_frames)
        taken = sizes.dit.weights.total + sampling_pass_bytes(sizes.dit, latents, options, batch=2)
        return taken < FILL_BY_BOTH * device_memory(self._device)

    def _in_tiles(self, sizes: ModelSizes, options: RunOptions) -> bool:
        """Return whether the VAE works in tiles, from the machine's total memory as in `_both_fit`."""
        frames = options.num_frames
        latents = sizes.latent_shape(options.height, options.width, frames)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        models = sizes.dit.weights.total + sizes.text_encoder.weights.total + sizes.vae.weights
        taken = max(encode_bytes(sizes.vae, latents, None), decode_bytes(sizes.vae, latents, None, frames))
        return models + taken >= FILL_BY_BOTH * (device_memory(self._device) or memory)

    def _explanation(self, stage: str, problem: str) -> str:
        total, free = (n / GB for n in (device_memory(self._device), available_memory(self._device)))
        memory = f"{self._device} has {f'{total:.1f} GiB, ' if total else ''}{free:.1f} GiB free"
        tried = f"; tried: {', '.join(self._given_up)}" if self._given_up else ""
        happened = f"memory ran out in the stage {stage!r} ({problem}); {memory}{tried}"
        return f"{happened}. What helps: {HELP[stage]}"


def memory_problem(error: BaseException) -> str:
    """Return the first line of an out-of-memory error; re-raise any other error."""
    if not is_out_of_memory(error):
        raise error
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports a failed allocation, on an accelerator or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(words in told for words in NO_ALGORITHM) and torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return free < FULL * total
    return any(words in told for words in ALLOCATION_FAILED)


def _changes(settings: Settings, options: RunOptions) -> dict[str, object]:
    """Return the values of options that `settings` imply, by the names that `settings_of` uses."""
    chosen = {name: getattr(settings, name) for name in _OF_OPTIONS}
    if options.cfg_scale == 1:
        chosen["batch_cfg"] = options.batch_cfg
    return {**chosen, "checkpoint": settings.checkpoint}
