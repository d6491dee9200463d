"""The ladder of settings that decide a run's memory, from the fastest to the most frugal.

A plan takes the first rung whose predicted peak fits (`rungs`); when memory runs out, a run goes to the next
one (`following`). Both go down in the same order: less of the weights on the device comes before keeping
less for the gradient, because at sizes that do not fit blocks compute for longer than they take to come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.models.wan_video_dit import WanModel
from diffsynth.models.wan_video_text_encoder import WanTextEncoder
from diffsynth.vram_management import Residency
from diffsynth.vram_management.streaming import tensors_of

# What the guidance pass keeps; the rest is computed again for a gradient.
_KEPT = {
    "none": "everything", "attention": "each block's input and its self-attention's result",
    "block": "each block's input", "offload": "each block's input in CPU memory",
}  # fmt: skip
KEEPING = tuple(_KEPT)
# Tiles of the VAE are not made smaller than this, in latent units: their borders would show.
SMALLEST_TILE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """The settings that decide a run's memory."""

    checkpoint: str = "none"  # what guidance keeps for its gradients, one of KEEPING
    batch_cfg: bool = True  # both prompts in one call of the DiT
    tiled: bool = False  # the VAE works in tiles
    tile_size: tuple[int, int]  # (rows, columns) in latent units
    tile_stride: tuple[int, int]  # from tile to tile, likewise
    offload: bool = False  # each model is on the device in its own stages only
    resident_blocks: int | None = None  # blocks of the DiT that do not stream; None: no streaming
    stream_text_encoder: bool = False  # its blocks stream

    def __str__(self) -> str:
        where = "each on the device in its own stages" if self.offload else "all on the device"
        if self.resident_blocks is not None:
            where += f", the DiT's blocks but {self.resident_blocks} streamed"
        return (
            f"guidance keeps {_KEPT[self.checkpoint]}; prompts in {'one call' if self.batch_cfg else 'turn'}"
            f"; VAE {'in tiles' if self.tiled else 'whole'}; models {where}"
            f"{', the text encoder streamed' if self.stream_text_encoder else ''}"
        )

    def place(self, residency: Residency) -> None:
        """Have the models of a pipeline where the settings say."""
        residency.stop_streaming()
        residency.offload = self.offload or "low_noise_dit" in residency.models  # one expert at a time
        if not self.offload:
            return
        residency.rest()
        if self.resident_blocks is not None:
            for name in residency.models.keys() & {"dit", "low_noise_dit"}:
                blocks = cast(WanModel, residency.models[name]).blocks
                staying = [t.numel() for block in blocks[: self.resident_blocks] for t in tensors_of(block)]
                residency.stream(name, blocks, sum(staying))
        if self.stream_text_encoder:
            text_encoder = cast(WanTextEncoder, residency.models["text_encoder"])
            residency.stream("text_encoder", text_encoder.encoder.block)


def keeping(motion: MotionGuidance | None) -> tuple[str, ...]:
    """Return what the guidance pass of a run may keep."""
    if motion is None or not DESCRIPTORS[motion.mode].needs_backward:
        return KEEPING[:1]
    return KEEPING if motion.checkpoint == "auto" else (motion.checkpoint,)


def rungs(frugal: Settings, kept: Sequence[str], num_blocks: int) -> Iterator[Settings]:
    """Yield what guidance keeps and where weights are, from the fastest to the most frugal."""
    for checkpoint in kept:
        whole = replace(frugal, checkpoint=checkpoint, resident_blocks=None)
        yield replace(whole, offload=False, stream_text_encoder=False)
        yield replace(whole, offload=True)
        for resident in range(num_blocks - 1, -1, -1):
            yield replace(whole, offload=True, resident_blocks=resident)


def following(
    stage: str, now: Settings, *, accelerator: bool, num_blocks: int, picture: tuple[int, int]
) -> Iterator[tuple[str, Settings]]:
    """Yield the rungs after `now` that need less in a stage, each with what it changes in words."""
    if accelerator and not now.offload:
        yield "each model is on the device during its own stage only", replace(now, offload=True)
    if stage == "sampling" and now.batch_cfg:
        yield "the prompts run in two calls, batch_cfg=False", replace(now, batch_cfg=False)
    if stage in ("guidance", "sampling") and accelerator:
        resident = num_blocks if now.resident_blocks is None else now.resident_blocks
        for count in (num_blocks // 2, 0):
            if count < resident:
                words = f"the blocks of the DiT but {count} are streamed from CPU memory"
                yield words, replace(now, offload=True, resident_blocks=count)
    if stage == "guidance":
        for checkpoint in KEEPING[KEEPING.index(now.checkpoint) + 1 :]:
            yield f"guidance runs with checkpoint={checkpoint!r}", replace(now, checkpoint=checkpoint)
    if stage == "encode text" and accelerator and not now.stream_text_encoder:
        words = "the blocks of the text encoder are streamed from CPU memory"
        yield words, replace(now, offload=True, stream_text_encoder=True)
    if stage in ("encode video", "decode") and (smaller := smaller_tiles(now, picture)) is not None:
        tiles = f"tiled=True, tile_size={smaller.tile_size}, tile_stride={smaller.tile_stride}"
        yield f"the VAE runs with {tiles}", smaller


def smaller_tiles(now: Settings, picture: tuple[int, int]) -> Settings | None:
    """Return settings whose VAE sees a picture of latents in tiles, or in tiles of half the side."""
    seen = tuple(map(min, now.tile_size, picture)) if now.tiled else picture
    size = tuple(map(min, now.tile_size, picture))
    if size == seen:
        size = tuple(max(n // 2, min(n, SMALLEST_TILE)) for n in size)
    if size == seen:
        return None
    shares = zip(size, now.tile_stride, now.tile_size, strict=True)
    rows, cols = (max(1, n * stride // whole) for n, stride, whole in shares)
    return replace(now, tiled=True, tile_size=(size[0], size[1]), tile_stride=(rows, cols))
