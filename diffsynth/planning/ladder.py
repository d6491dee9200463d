"""What a run gives up when memory runs out, stage by stage, so that no finished step is lost.

The stage that failed is done again from its beginning, denoising from its last finished step, with one thing
less to hold; what was changed stays changed for the rest of the run.
"""

import gc
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from diffsynth.configs.guidance import CHECKPOINTS
from diffsynth.motion import MotionGuidance
from diffsynth.vram_management import available_memory, device_memory

if TYPE_CHECKING:
    from diffsynth.configs.options import RunOptions
    from diffsynth.models.wan_video_vae import WanVideoVAE
    from diffsynth.pipelines.wan_video import WanVideoPipeline

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Tiles of the VAE are not made smaller than this, in latent units: their borders would show.
SMALLEST_TILE = 8
CHANGEABLE = ("batch_cfg", "tiled", "tile_size", "tile_stride")
# How torch says it apart from its own exception: CPU, cuBLAS, cuDNN, a kernel's launch.
ALLOCATION_FAILED = ("can't allocate memory", "ALLOC_FAILED", "CUDA error: out of memory")


class MemoryRanOutError(RuntimeError):
    """Memory ran out in a stage that has nothing left to give up."""


class Options(Protocol):
    """What decoding needs; denoising needs `RunOptions`."""

    height: int
    width: int
    tiled: bool
    tile_size: tuple[int, int]
    tile_stride: tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What can be changed beside options: a whole pipeline, or a VAE alone."""

    vae: "WanVideoVAE"
    pipe: "WanVideoPipeline | None" = None


# What is changed, in words, with the options from then on; None if nothing can be changed in this way.
Change = tuple[str, Options] | None
Fallback = Callable[[Holder, Options], Change]


def rest_models(holder: Holder, options: Options) -> Change:
    """Models that the stage does not use leave the accelerator."""
    pipe = holder.pipe
    if pipe is None or pipe.device.type == "cpu" or pipe.residency.offload:
        return None
    pipe.enable_cpu_offload()
    return "each model is on the device during its own stage only", options


def stream_blocks(name: str) -> Fallback:
    """The blocks of "dit" or "text_encoder" come one by one, each while the one before it computes."""

    def fallback(holder: Holder, options: Options) -> Change:
        pipe = holder.pipe
        if pipe is None or pipe.device.type == "cpu" or name in pipe.residency.streaming:
            return None
        blocks = pipe.dit.blocks if name == "dit" else pipe.text_encoder.encoder.block
        pipe.residency.stream(name, blocks)
        return f"the blocks of the {name} are streamed from CPU memory", options

    return fallback


def keep_less_for_the_gradient(_holder: Holder, options: Options) -> Change:
    """Guidance computes activations again in the backward pass, and then keeps its few ones on the CPU."""
    motion: MotionGuidance | None = options.motion
    order = [name for name in ("block", "offload") if name in CHECKPOINTS]
    following = order[order.index(motion.checkpoint) + 1 :] if motion.checkpoint in order else order
    if not following:
        return None
    return f"guidance runs with checkpoint={following[0]!r}", replace(
        options, motion=replace(motion, checkpoint=following[0])
    )


def two_calls(_holder: Holder, options: Options) -> Change:
    """Both prompts in a DiT call of their own; rounds a little otherwise than one call with both."""
    if not options.batch_cfg or options.cfg_scale == 1:
        return None
    return "the prompts run in two calls, batch_cfg=False", replace(options, batch_cfg=False)


def smaller_tiles(holder: Holder, options: Options) -> Change:
    """The VAE sees the picture in tiles, then in tiles of half the side."""
    factor = holder.vae.spatial_factor
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


def settings_of(options: "RunOptions") -> dict[str, object]:
    """The options that fallbacks may change, as JSON holds them."""
    checkpoint = None if options.motion is None else options.motion.checkpoint
    return {**{name: getattr(options, name) for name in CHANGEABLE}, "checkpoint": checkpoint}


def with_settings(options: "RunOptions", settings: Mapping[str, object]) -> "RunOptions":
    """Options with those of `settings_of` put back."""
    motion = options.motion and replace(options.motion, checkpoint=settings["checkpoint"])
    return replace(options, motion=motion, **{name: settings[name] for name in CHANGEABLE})


class MemoryFallbacks:
    """Runs stages, and again with less where memory runs out.

    options: those in force; they start as given and change with each fallback.
    """

    def __init__(self, holder: Holder, options: Options) -> None:
        self._holder, self.options = holder, options
        self._given_up: list[str] = []

    def run(self, stage: str | Callable[[], str], attempt: Callable[[Options], T]) -> T:
        """attempt(options), as often as there is something to give up; each change is one warning.

        stage: a key of FALLBACKS, asked for after a failure if it is a function. Raises MemoryRanOutError,
        with what there is and what helps, if nothing is left.
        """
        while True:
            try:
                return attempt(self.options)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            # Out of the except block nothing holds the failed attempt's frames and their tensors any more.
            gc.collect()
            torch.cuda.empty_cache()
            self._give_up(stage if isinstance(stage, str) else stage(), said)

    def _give_up(self, stage: str, said: str) -> None:
        for fallback in FALLBACKS[stage]:
            change = fallback(self._holder, self.options)
            if change is not None:
                words, self.options = change
                self._given_up.append(words)
                logger.warning("memory ran out in the stage %r: %s from now on (%s)", stage, words, said)
                return
        raise MemoryRanOutError(self._why(stage, said))

    def _why(self, stage: str, said: str) -> str:
        device = self._holder.vae.device if self._holder.pipe is None else self._holder.pipe.device
        total, free = (n / 2**30 for n in (device_memory(device), available_memory(device)))
        there = f"{device} has {f'{total:.1f} GiB, ' if total else ''}{free:.1f} GiB free"
        tried = f"; tried: {', '.join(self._given_up)}" if self._given_up else ""
        return f"memory ran out in the stage {stage!r} ({said}); {there}{tried}. What helps: {HELP[stage]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had, on an accelerator or on the CPU."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ALLOCATION_FAILED)
