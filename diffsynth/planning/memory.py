"""Peak memory of each stage of a run, predicted from sizes alone, before anything is loaded.

Counted are the bytes of tensors alive at once, as an accelerator's allocator reports them at its peak; not
its context and the work space of its kernels. The formulas follow the code statement by statement; at the
sizes of the published models they are within a few per cent of `testing_memory`. Windowed attention is
counted as the dense, as on an accelerator it keeps the same.
Axes: F latent frames, h/w latent rows/columns, S tokens; w bytes of a number in the DiT's dtype.
"""

from dataclasses import dataclass
from math import prod

from diffsynth.caches.choose import make_rule
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import CacheMaker
from diffsynth.models.wan_video_vae_layers import IMAGE_CHANNELS, NUM_PAST
from diffsynth.motion.flow import frame_pairs
from diffsynth.planning.activations import (
    STREAM,
    activation_bytes,
    block_gradient_bytes,
    forward_bytes,
)
from diffsynth.planning.sizes import DiTSize, ModelSizes, TextEncoderSize, VAESize

Shape = tuple[int, int, int]  # F, h, w
INDEX = 8  # bytes of an index
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """What is made: latent shape (F, h, w), frames in all, and whether there is a reference to encode."""

    latents: Shape
    num_frames: int
    has_reference: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Predicted bytes of a stage: weights on the device, and what it computes with at its peak."""

    stage: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True, slots=True)
class MemorySettings:
    """What decides a run's memory.

    checkpoint: of MotionGuidance. batch_cfg: both prompts in one DiT call. tiled: of the VAE, with tile_size
    (rows, columns) in latent positions. offload: each model is on the device only in its stages.
    resident_blocks: blocks of the DiT that stay on the device while it computes and the others stream; None:
    all, without streaming. stream_text_encoder: whether its blocks stream.
    """

    checkpoint: str = "none"
    batch_cfg: bool = True
    tiled: bool = False
    tile_size: tuple[int, int] = (30, 52)
    offload: bool = False
    resident_blocks: int | None = None
    stream_text_encoder: bool = False


def predict_stages(
    sizes: ModelSizes,
    video: Video,
    settings: MemorySettings,
    *,
    motion: MotionGuidance | None,
    with_negative: bool = True,
    cache: CacheMaker | None = None,
) -> tuple[StageMemory, ...]:
    """Predicted memory of each stage in the order of a run; without offload, models stay once they came."""
    dit, vae = sizes.dit, sizes.vae
    text = sizes.text_encoder.weights
    resident = settings.resident_blocks
    own = {
        "encode text": text.streamed() if settings.stream_text_encoder else text.total,
        "encode video": vae.weights,
        "guidance": dit.weights.total if resident is None else dit.weights.streamed(resident),
        "decode": vae.weights,
    }
    own["sampling"] = own["guidance"]
    tile = settings.tile_size if settings.tiled else None
    batch = 2 if settings.batch_cfg and with_negative else 1
    work = {"encode text": text_encoder_bytes(sizes.text_encoder, dit.text_len)}
    if video.has_reference:
        work["encode video"] = encode_bytes(vae, video.latents, tile)
    if motion is not None:
        work["guidance"] = guided_pass_bytes(dit, video.latents, motion, settings.checkpoint)
    prompts = 2 if with_negative else 1
    work["sampling"] = sampling_pass_bytes(dit, video.latents, batch, cache, prompts)
    work["decode"] = decode_bytes(vae, video.latents, tile, video.num_frames)
    stages, came = [], {}
    for stage, activations in work.items():
        model = {"guidance": "dit", "sampling": "dit", "encode text": "text"}.get(stage, "vae")
        came = {model: own[stage]} if settings.offload else {**came, model: own[stage]}
        stages.append(StageMemory(stage=stage, weights=sum(came.values()), activations=activations))
    return tuple(stages)


def num_tokens(dit: DiTSize, latents: Shape, coarse: int = 1) -> int:
    """Tokens of the DiT for latents F, h, w that are averaged over squares of a side before (1: not)."""
    return prod(token_grid(dit, latents, coarse))


def token_grid(dit: DiTSize, latents: Shape, coarse: int = 1) -> Shape:
    """Token frames, rows and columns, as `num_tokens`."""
    sides = (latents[0], *(-(-side // coarse) for side in latents[1:]))
    return tuple(-(-side // patch) for side, patch in zip(sides, dit.patch_size, strict=True))


def guided_pass_bytes(dit: DiTSize, latents: Shape, motion: MotionGuidance, checkpoint: str) -> int:
    """Peak of a guided step's first gradient, weights aside.

    The largest of three moments, each beside what the blocks keep ("none": all; "block": their inputs): the
    reference's pass while the generated one's features wait for it; the flow, forward or backward; and the
    last block that is differentiated.
    """
    small = _run_bytes(dit, latents)
    if motion.mode == "FlowMotion":
        return small + max(forward_bytes(dit, num_tokens(dit, latents)), _difference_bytes(dit, latents))
    grid = token_grid(dit, latents, motion.coarse)
    tokens, w = prod(grid), dit.dtype.itemsize
    width = tokens * dit.dim
    num_blocks = motion.block_for(dit.num_layers)
    features = width * (3 * STREAM + 2 * w)  # what q and k of the read block keep, and they themselves
    reference = features + (forward_bytes(dit, tokens) if num_blocks else width * (14 + 3 * w))
    flow = features + flow_bytes(dit, grid, motion)
    if checkpoint == "none":
        kept, block = activation_bytes(dit, tokens, num_blocks), STREAM * width + 2 * tokens * dit.ffn_dim * w
    else:
        kept = STREAM * width * num_blocks if checkpoint == "block" else 0
        # The block's own input is among what it keeps.
        block = block_gradient_bytes(dit, tokens) - (STREAM * width if kept else 0)
    return small + kept + max(reference, flow, block if num_blocks else 0)


def flow_bytes(dit: DiTSize, grid: Shape, motion: MotionGuidance) -> int:
    """What flow adds to the features at its peak: features without heads, their gradients, and looks.

    Looks: of the pairs held at a time, the keys that a group of queries sees, their places and three times
    the attention weights; and the places of all windows.
    """
    frames, rows, cols = grid
    area, w = rows * cols, dit.dtype.itemsize
    head_dim = dit.dim // dit.num_heads
    if motion.heads == "mean_logits":
        width = dit.dim
    else:
        width = head_dim * (1 if isinstance(motion.heads, str) else len(motion.heads))
    one = frames * area * width * FLOAT  # q or k without heads
    pairs = len(frame_pairs(frames, motion.sf))
    looks = min(motion.chunk, frames) * (_look_bytes(area, width) + 3 * area * area * FLOAT)
    places = 0
    if motion.mode == "effi_AMF":
        seen = min(motion.window, rows) * min(motion.window, cols)
        tiles = -(-rows // motion.tile[0]) * -(-cols // motion.tile[1])
        queries = prod(motion.tile)
        between = pairs - frames
        places = between * tiles * seen * INDEX
        at_a_time = min(motion.chunk, between) * tiles
        looks = max(looks, at_a_time * (_look_bytes(seen, width) + 3 * queries * seen * FLOAT))
    reference_features = 2 * frames * area * dit.dim * w
    return 2 * one + max(reference_features, 2 * one) + looks + places


def sampling_pass_bytes(
    dit: DiTSize, latents: Shape, batch: int, cache: CacheMaker | None = None, num_prompts: int = 2
) -> int:
    """Peak of a denoising step's velocity, weights aside; a step cache keeps residuals of each prompt."""
    tokens = num_tokens(dit, latents)
    residuals = 0
    if cache is not None:
        # A cache that watches the first block keeps what that added, too, now and when all ran.
        residuals = num_prompts * (1 if make_rule(cache, "positive", range(1), 1).probe_blocks == 0 else 3)
    kept = residuals * tokens * dit.dim * STREAM
    return _run_bytes(dit, latents) + forward_bytes(dit, tokens, batch) + kept


def text_encoder_bytes(encoder: TextEncoderSize, text_len: int) -> int:
    """Peak of encoding a text of full length: eight bytes for each pair of tokens and head."""
    return 2 * FLOAT * encoder.num_heads * text_len**2


def decode_bytes(
    vae: VAESize, latents: Shape, tile: tuple[int, int] | None, num_frames: int, whole_video: bool = False
) -> int:
    """Peak of decoding: of one chunk, the past that causal layers keep, and the video if it is tiled.

    tile: rows and columns in latent positions, None for untiled. whole_video: it is kept untiled, too.
    """
    _, rows, cols = latents
    height, width = tile_side = _tile_side(latents, tile)
    area, now, channels = height * width, 1, vae.widths[-1]
    past = area * (vae.z_dim + 4 * channels)
    largest = area * channels
    levels = vae.widths[::-1]
    for level, out in enumerate(levels):
        for _ in range(vae.num_res_blocks + 1):
            past += area * (channels + out)
            largest = max(largest, now * area * max(channels, out))
            channels = out
        if level < len(levels) - 1:
            if vae.temporal[::-1][level]:
                past += area * channels
                now *= 2
            area, channels = 4 * area, channels // 2
    past += area * channels
    video = 0
    if whole_video or tile_side != (rows, cols):
        video = IMAGE_CHANNELS * num_frames * rows * cols * 4 ** len(vae.temporal) * FLOAT
    return video + _chunk_bytes(vae, past, largest)


def encode_bytes(vae: VAESize, latents: Shape, tile: tuple[int, int] | None) -> int:
    """Peak of encoding; the video itself is on the CPU. Arguments as for `decode_bytes`."""
    height, width = _tile_side(latents, tile)
    area, now, channels = height * width * 4 ** len(vae.temporal), 2 ** sum(vae.temporal), vae.widths[0]
    past, largest = area * IMAGE_CHANNELS, 0
    for level, out in enumerate(vae.widths):
        for _ in range(vae.num_res_blocks):
            past += area * (channels + out)
            largest = max(largest, now * area * max(channels, out))
            channels = out
        if level < len(vae.temporal):
            area //= 4
            if vae.temporal[level]:
                past += area * channels // NUM_PAST
                now //= 2
    past += 5 * area * channels
    return _chunk_bytes(vae, past, largest)


def _tile_side(latents: Shape, tile: tuple[int, int] | None) -> tuple[int, int]:
    _, rows, cols = latents
    return (rows, cols) if tile is None else (min(tile[0], rows), min(tile[1], cols))


def _chunk_bytes(vae: VAESize, past: int, largest: int) -> int:
    """past: positions and channels that layers remember, of two frames each. largest: elements of the largest
    tensor of a chunk; a residual block holds its input, a convolution's result, and the norm's square and
    result, these in float32, before it is rounded.
    """
    size = vae.dtype.itemsize
    rounded = size if size < FLOAT else 0
    return NUM_PAST * past * size + largest * (2 * size + 2 * max(size, FLOAT) + rounded)


def _run_bytes(dit: DiTSize, latents: Shape) -> int:
    """What there is all the time: latents, noise, reference and copies of them, texts, rotary positions; and
    a matrix that is widened from float8.
    """
    texts = 3 * dit.text_len * dit.text_dim * dit.dtype.itemsize
    rotary = num_tokens(dit, latents) * dit.dim // dit.num_heads * FLOAT
    return 6 * dit.in_dim * prod(latents) * FLOAT + texts + rotary + dit.widened


def _difference_bytes(dit: DiTSize, latents: Shape) -> int:
    """FlowMotion's loss: differences of all pairs of frames, five such tensors at once."""
    frames, rows, cols = latents
    differences = frames * (frames - 1) // 2 + frames - 1
    return 5 * dit.in_dim * differences * rows * cols * FLOAT


def _look_bytes(num_keys: int, width: int) -> int:
    return num_keys * (width * FLOAT + INDEX)
