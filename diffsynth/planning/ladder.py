"""What a run gives up when memory runs out, stage by stage, so that no finished step is lost.

The stage that failed is done again from its beginning, denoising from its last finished step, with one thing
less to hold; what was changed stays changed for the rest of the run.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_vae import WanVideoVAE
from diffsynth.planning.plan import plan_run
from diffsynth.planning.sizes import ModelSizes
from diffsynth.vram_management import Residency, available_memory, device_memory

logger = logging.getLogger(__name__)

# Tiles of the VAE are not made smaller than this, in latent units: their borders would show.
SMALLEST_TILE = 8
CHANGEABLE = ("batch_cfg", "tiled", "tile_size", "tile_stride")
# How torch says it apart from its own exception: CPU, cuBLAS, cuDNN, a kernel's launch.
ALLOCATION_FAILED = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")


class MemoryRanOutError(RuntimeError):
    """Memory ran out in a stage that has nothing left to give up."""


# What is changed, in words, with the options from then on; None if nothing can be changed in this way.
Change = tuple[str, RunOptions] | None
Fallback = Callable[["Ladder", RunOptions], Change]


def rest_models(ladder: "Ladder", options: RunOptions) -> Change:
    """Models that the stage does not use leave the accelerator."""
    residency = ladder.residency
    if residency is None or residency.device.type == "cpu" or residency.offload:
        return None
    residency.offload = True
    residency.rest()
    return "each model is on the device during its own stage only", options


def stream_blocks(name: str) -> Fallback:
    """The blocks of "dit" or "text_encoder" come one by one, each while the one before it computes."""

    def fallback(ladder: "Ladder", options: RunOptions) -> Change:
        residency = ladder.residency
        if residency is None or residency.device.type == "cpu" or name in residency.streaming:
            return None
        model = residency.models[name]
        residency.stream(name, model.blocks if name == "dit" else model.encoder.block)
        return f"the blocks of the {name} are streamed from CPU memory", options

    return fallback


def keep_less_for_the_gradient(_ladder: "Ladder", options: RunOptions) -> Change:
    """Guidance computes activations again in the backward pass, and then keeps its few ones on the CPU."""
    motion = options.motion
    order = ["block", "offload"]
    following = order[order.index(motion.checkpoint) + 1 :] if motion.checkpoint in order else order
    if not following:
        return None
    return f"guidance runs with checkpoint={following[0]!r}", replace(
        options, motion=replace(motion, checkpoint=following[0])
    )


def two_calls(_ladder: "Ladder", options: RunOptions) -> Change:
    """Both prompts in a DiT call of their own; rounds a little otherwise than one call with both."""
    if not options.batch_cfg or options.cfg_scale == 1:
        return None
    return "the prompts run in two calls, batch_cfg=False", replace(options, batch_cfg=False)


def smaller_tiles(ladder: "Ladder", options: RunOptions) -> Change:
    """The VAE sees the picture in tiles, then in tiles of half the side."""
    factor = ladder.vae.spatial_factor
    picture = (options.height // factor, options.width // factor)
    size = tuple(min(pair) for pair in zip(options.tile_size, picture, strict=True))
    if options.tiled or size == picture:
        size = tuple(max(n // 2, min(n, SMALLEST_TILE)) for n in size)
    seen = picture if not options.tiled else tuple(map(min, options.tile_size, picture))
    if size == seen:
        return None
    shares = zip(size, options.tile_stride, options.tile_size, strict=True)
    stride = tuple(max(1, n * stride // whole) for n, stride, whole in shares)
    words = f"the VAE runs with tiled=True, tile_size={size}, tile_stride={stride}"
    return words, replace(options, tiled=True, tile_size=size, tile_stride=stride)


FALLBACKS: Mapping[str, tuple[Fallback, ...]] = {
    "encode text": (rest_models, stream_blocks("text_encoder")),
    "encode video": (rest_models, smaller_tiles),
    "guidance": (rest_models, keep_less_for_the_gradient, stream_blocks("dit")),
    "sampling": (rest_models, two_calls, stream_blocks("dit")),
    "decode": (rest_models, smaller_tiles),
}
HELP = {
    "encode text": "a text encoder in bfloat16, or device='cpu'",
    "encode video": "a lower height and width, or fewer num_frames",
    "guidance": "motion with coarse=2 or an earlier block, a lower height and width, or fewer num_frames",
    "sampling": "a lower height and width, fewer num_frames, or torch_dtype=torch.float8_e4m3fn",
    "decode": "decode_saved on a machine with more memory (see checkpoint_dir), or output_type='latent'",
}


def settings_of(options: RunOptions) -> dict[str, object]:
    """Return the options that may change when memory runs out, as JSON holds them."""
    checkpoint = None if options.motion is None else options.motion.checkpoint
    return {**{name: getattr(options, name) for name in CHANGEABLE}, "checkpoint": checkpoint}


def with_settings(options: RunOptions, settings: Mapping[str, object]) -> RunOptions:
    """Return options with those of `settings_of` put back."""
    motion = options.motion and replace(options.motion, checkpoint=settings["checkpoint"])
    return replace(options, motion=motion, **{name: settings[name] for name in CHANGEABLE})


class Ladder:
    """The settings of a run, from the fastest to the most frugal.

    Args:
        residency: where the models of a pipeline are; None for a VAE alone.
        vae: the VAE.
    """

    def __init__(self, residency: Residency | None, vae: WanVideoVAE) -> None:
        self.residency, self.vae = residency, vae
        self._given_up: list[str] = []

    def begin(self, options: RunOptions, vram_gb: float | None, *, with_reference: bool) -> RunOptions:
        """Return the options of a run with all settings decided, and have models where they say.

        Args:
            options: as resolved.
            vram_gb: memory of the device that the run may use, GB of 2**30 bytes; None for what there is.
            with_reference: whether a video is encoded.

        Raises:
            NotEnoughMemoryError: no settings fit into vram_gb.
        """
        if vram_gb is not None:
            plan = plan_run(
                ModelSizes.of(self.residency.models),
                options,
                vram_gb=vram_gb,
                with_reference=with_reference,
            )
            logger.info("planned for %s GB:\n%s", vram_gb, plan)
            plan.place(self.residency)
            motion = options.motion and replace(options.motion, checkpoint=plan.checkpoint)
            options = replace(options, motion=motion, batch_cfg=plan.batch_cfg)
        if options.batch_cfg is None:
            options = replace(options, batch_cfg=False)
        return options

    def next(self, stage: str, options: RunOptions, problem: str) -> RunOptions:
        """Return the options of the next rung for a stage, after one warning; models are placed accordingly.

        Args:
            stage: a key of FALLBACKS.
            options: those with which memory ran out.
            problem: from `out_of_memory`.

        Raises:
            MemoryRanOutError: no rung is left; the message says what there is and what helps.
        """
        gc.collect()
        torch.cuda.empty_cache()
        for fallback in FALLBACKS[stage]:
            change = fallback(self, options)
            if change is not None:
                words, options = change
                self._given_up.append(words)
                logger.warning("memory ran out in the stage %r: %s from now on (%s)", stage, words, problem)
                return options
        device = self.vae.device if self.residency is None else self.residency.device
        total, free = (n / 2**30 for n in (device_memory(device), available_memory(device)))
        memory = f"{device} has {f'{total:.1f} GiB, ' if total else ''}{free:.1f} GiB free"
        tried = f"; tried: {', '.join(self._given_up)}" if self._given_up else ""
        raise MemoryRanOutError(
            f"memory ran out in the stage {stage!r} ({problem}); {memory}{tried}. What helps: {HELP[stage]}"
        )


def out_of_memory(error: BaseException) -> str:
    """Return the first line of an error that says that memory ran out. Raises any other error itself."""
    if not is_out_of_memory(error):
        raise error
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception says that memory could not be had, on an accelerator or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)
