"""Peak memory of each stage of a run, predicted from sizes alone, before anything is loaded.

Counted are the bytes of tensors alive at once, as an accelerator's allocator reports them at its peak; not
its context and the work space of its kernels. Windowed attention is counted as the dense, as on an
accelerator it keeps the same.
Running the real code on a device without data would give the same peaks, but too slowly: a plan asks for up
to some 130 settings and takes 0.5 to 7 ms, while one measured pass took 3.6 to 5.4 s. So the formulas follow
the code statement by statement, and the tests hold them to what the real code takes on such a device.
Axes: F latent frames, h/w latent rows/columns, S tokens; w bytes of a number in the DiT's dtype.
"""

from dataclasses import dataclass
from math import prod

from diffsynth.caches.rules import make_rule
from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import RunOptions
from diffsynth.models.wan_video_dit_layers import SLICE_TOKENS
from diffsynth.models.wan_video_vae_layers import IMAGE_CHANNELS, NUM_PAST
from diffsynth.motion.flow import GATHERED_BYTES, frame_pairs
from diffsynth.planning.settings import Settings
from diffsynth.planning.sizes import DiTSize, ModelSizes, TextEncoderSize, VAESize

Shape = tuple[int, int, int]  # F, h, w
INDEX = 8  # bytes of an index
FLOAT = 4  # bytes of a float32
STREAM = 4  # bytes of a number of the residual stream
PICTURE_BYTES = 2**25  # more than CLIP takes for 257 tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StageMemory:
    """Predicted bytes of a stage: weights on the device, and what it computes with at its peak."""

    stage: str
    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


def predict_stages(
    sizes: ModelSizes, options: RunOptions, settings: Settings, with_reference: bool
) -> tuple[StageMemory, ...]:
    """Return the predicted memory of each stage in the order of a run; without offload, models stay."""
    dit, vae, text = sizes.dit, sizes.vae, sizes.text_encoder.weights
    latents = sizes.latent_shape(options.height, options.width, options.num_frames)
    resident = settings.resident_blocks
    own = {
        "text": text.streamed() if settings.stream_text_encoder else text.total,
        "image": sizes.image_encoder,
        "dit": dit.weights.total if resident is None else dit.weights.streamed(resident),
        "vae": vae.weights,
    }
    tile = settings.tile_size if settings.tiled else None
    batch = 2 if settings.batch_cfg and options.cfg_scale != 1 else 1
    work = [("encode text", "text", text_encoder_bytes(sizes.text_encoder, dit.text_len))]
    if sizes.image_encoder:
        work.append(("encode picture", "image", PICTURE_BYTES))
    if with_reference or dit.in_dim > dit.out_dim:
        work.append(("encode video", "vae", encode_bytes(vae, latents, tile)))
    if options.motion is not None:
        guided = guided_pass_bytes(dit, latents, options.motion, settings.checkpoint)
        work.append(("guidance", "dit", guided))
    work.append(("sampling", "dit", sampling_pass_bytes(dit, latents, options, batch)))
    work.append(("decode", "vae", decode_bytes(vae, latents, tile, options.num_frames)))
    stages = []
    present: dict[str, int] = {}
    for stage, model, activations in work:
        present = {**({} if settings.offload else present), model: own[model]}
        stages.append(StageMemory(stage=stage, weights=sum(present.values()), activations=activations))
    return tuple(stages)


def num_tokens(dit: DiTSize, latents: Shape, coarse: int = 1) -> int:
    """Return the DiT's tokens for latents F, h, w that are first averaged over squares of side `coarse`."""
    return prod(token_grid(dit, latents, coarse))


def token_grid(dit: DiTSize, latents: Shape, coarse: int = 1) -> Shape:
    """Token frames, rows and columns, as `num_tokens`."""
    sides = (latents[0], *(-(-side // coarse) for side in latents[1:]))
    frames, rows, cols = (-(-side // patch) for side, patch in zip(sides, dit.patch_size, strict=True))
    return frames, rows, cols


def guided_pass_bytes(dit: DiTSize, latents: Shape, motion: MotionGuidance, checkpoint: str) -> int:
    """Return the peak of a guided step's first gradient, weights aside.

    It is the largest of three moments, each beside what the blocks keep ("none": all; "block": their
    inputs; "attention": the results of self-attention, too): the reference's pass while the generated one's
    features wait for it; the flow, forward or backward; and the last block that is differentiated.
    """
    small = run_bytes(dit, latents)
    if not DESCRIPTORS[motion.mode].needs_backward:
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
        one = 0 if checkpoint == "offload" else STREAM * width
        one += w * width + FLOAT * tokens * dit.num_heads if checkpoint == "attention" else 0
        kept = one * num_blocks
        # The block's own input is among what it keeps.
        block = block_gradient_bytes(dit, tokens) - one
    return small + kept + max(reference, flow, block if num_blocks else 0)


def flow_bytes(dit: DiTSize, grid: Shape, motion: MotionGuidance) -> int:
    """Return what flow adds to the features at its peak: features without heads, first tokens of windows,
    and the larger of two moments.

    Forward: what is kept for the gradient (the expected positions, or the attention weights inside windows),
    and the current pairs or gathered keys. Backward: the gradients of the features, in float32 first.
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
    indices, kept = 0, pairs * area * width * FLOAT
    at_hand = 3 * min(motion.chunk, frames) * area * width * FLOAT
    if motion.mode == "effi_AMF":
        seen = min(motion.window, rows) * min(motion.window, cols)
        tiles = -(-rows // motion.tile[0]) * -(-cols // motion.tile[1])
        windows = (pairs - frames) * tiles * seen
        indices, kept = windows * INDEX, windows * prod(motion.tile) * FLOAT
        at_hand = 2 * min(GATHERED_BYTES, tiles * seen * width * FLOAT)
    gradients = frames * area * dit.dim * (2 * FLOAT + (w if w < FLOAT else 0))
    return 2 * one + indices + max(kept + at_hand, gradients)


def sampling_pass_bytes(dit: DiTSize, latents: Shape, options: RunOptions, batch: int) -> int:
    """Return the peak of a denoising step's velocity, weights aside, for a batch of one or both prompts."""
    tokens, cache = num_tokens(dit, latents), options.cache
    kept = 0
    if isinstance(cache, CacheOptions):
        kept = CACHES[cache.name].kept_tensors
    elif cache is not None:
        # A rule that watches blocks keeps what they added, too, now and when all ran.
        kept = 1 if make_rule(cache, "positive", range(1), 1).probe_blocks == 0 else 3
    prompts = 2 if options.cfg_scale != 1 else 1
    cached = prompts * kept * tokens * dit.dim * STREAM
    return run_bytes(dit, latents) + forward_bytes(dit, tokens, batch) + cached


def text_encoder_bytes(encoder: TextEncoderSize, text_len: int) -> int:
    """Return the peak of encoding a text of full length: eight bytes for each pair of tokens and head."""
    return 2 * FLOAT * encoder.num_heads * text_len**2


def decode_bytes(vae: VAESize, latents: Shape, tile: tuple[int, int] | None, num_frames: int) -> int:
    """Return the peak of decoding: a chunk, the past that causal layers keep, the video if it is tiled."""
    _, rows, cols = latents
    height, width = tile_side = _tile_side(latents, tile)
    area, now, channels = height * width, 1, vae.decoder_widths[0]
    past = area * (vae.z_dim + 4 * channels)
    largest = area * channels
    for level, out in enumerate(vae.decoder_widths):
        past += area * (channels + (2 * vae.num_res_blocks + 1) * out)  # of two convolutions in each block
        largest = max(largest, now * area * max(channels, out))
        channels = out
        if level < len(vae.temporal):
            if vae.temporal[::-1][level]:
                past += area * channels
                now *= 2
            area, channels = 4 * area, channels // 2 if vae.patch == 1 else channels
    past += area * channels
    video = 0
    if tile_side != (rows, cols):
        video = IMAGE_CHANNELS * num_frames * rows * cols * vae.spatial_factor**2 * FLOAT
    return video + _chunk_bytes(vae, past, largest)


def encode_bytes(vae: VAESize, latents: Shape, tile: tuple[int, int] | None) -> int:
    """Return the peak of encoding a video that is on the CPU; arguments as for `decode_bytes`."""
    height, width = _tile_side(latents, tile)
    area, now, channels = height * width * 4 ** len(vae.temporal), 2 ** sum(vae.temporal), vae.widths[0]
    past, largest = area * IMAGE_CHANNELS * vae.patch**2, 0
    for level, out in enumerate(vae.widths):
        past += area * (channels + (2 * vae.num_res_blocks - 1) * out)  # of two convolutions in each block
        largest = max(largest, now * area * max(channels, out))
        channels = out
        if level < len(vae.temporal):
            area //= 4
            if vae.temporal[level]:
                past += area * channels // NUM_PAST
                now //= 2
    past += 5 * area * channels
    before = largest * vae.dtype.itemsize if vae.patch > 1 else 0  # a level's input waits for its shortcut
    return _chunk_bytes(vae, past, largest) + before


def _tile_side(latents: Shape, tile: tuple[int, int] | None) -> tuple[int, int]:
    _, rows, cols = latents
    return (rows, cols) if tile is None else (min(tile[0], rows), min(tile[1], cols))


def _chunk_bytes(vae: VAESize, past: int, largest: int) -> int:
    """Bytes of what layers remember, of NUM_PAST frames each, and of a chunk by its largest tensor."""
    size = vae.dtype.itemsize
    # A residual block holds its input, a convolution's result, and the norm's square and result in float32.
    rounded = size if size < FLOAT else 0
    return NUM_PAST * past * size + largest * (2 * size + 2 * max(size, FLOAT) + rounded)


def run_bytes(dit: DiTSize, latents: Shape) -> int:
    """Return what a run holds throughout: latents, noise, reference, copies, texts, rotary positions; and
    a matrix that is widened from float8.
    """
    texts = 3 * dit.text_len * dit.text_dim * dit.dtype.itemsize
    rotary = num_tokens(dit, latents) * dit.dim // dit.num_heads * FLOAT
    return 6 * dit.in_dim * prod(latents) * FLOAT + texts + rotary + dit.widened


def _difference_bytes(dit: DiTSize, latents: Shape) -> int:
    """FlowMotion's loss: differences of all pairs of frames, five such tensors at once."""
    frames, rows, cols = latents
    differences = frames * (frames - 1) // 2 + frames - 1
    return 5 * dit.out_dim * differences * rows * cols * FLOAT


def activation_bytes(dit: DiTSize, num_tokens: int, num_blocks: int) -> int:
    """Return the bytes that `num_blocks` blocks keep for the gradient of their input, weights taking none.

    A block keeps the inputs of its six norms in float32, six tensors of the width (queries, keys, values and
    output of the self-attention, queries and output of the cross-attention) and the feed-forward's hidden
    layer in the dtype of the weights, statistics of norms and attentions, and the text's keys and values.
    """
    w = dit.dtype.itemsize
    a_token = dit.dim * (24 + 6 * w) + dit.ffn_dim * w + 4 * (9 + 2 * dit.num_heads)
    return num_blocks * (num_tokens * a_token + dit.text_len * dit.dim * 2 * w)


def block_gradient_bytes(dit: DiTSize, num_tokens: int) -> int:
    """Return the bytes of one block that is computed again and differentiated, with both gradients.

    It is the larger of two moments: the end of the second forward, which holds the hidden layer before and
    after its activation and three tensors of the width beside what it keeps; and the activation's gradient,
    when there are three hidden layers.
    """
    w = dit.dtype.itemsize
    kept = activation_bytes(dit, num_tokens, 1)
    gradient = STREAM * dit.dim
    forward_end = gradient + 3 * w * dit.dim + dit.ffn_dim * w
    activation = gradient + 2 * dit.ffn_dim * w
    return kept + num_tokens * max(forward_end, activation)


def forward_bytes(dit: DiTSize, num_tokens: int, batch: int = 1) -> int:
    """Return the peak of a pass without gradients through the blocks.

    It is the larger of two moments: the norm of the cross-attention's queries, with three states of the
    stream and the text's keys and values; and the feed-forward's last slice.
    """
    w = dit.dtype.itemsize
    text = dit.text_len * dit.dim * w
    attention = num_tokens * dit.dim * (5 * STREAM + 3 * w) + 3 * text
    hidden = min(num_tokens, SLICE_TOKENS) * dit.ffn_dim * 2 * w
    feed_forward = num_tokens * dit.dim * (3 * STREAM + 3 * w) + hidden + text
    return batch * max(attention, feed_forward)
