"""Attention motion flow as a descriptor: tile ("effi_AMF"), dense ("AMF") and as released.

loss = amf_weight * amf + window_weight * window      (paper section 3.3; `losses`)
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.motion.descriptors import Loss, StepInputs
from diffsynth.motion.flow import Pairs, attention_motion_flow, frame_pairs
from diffsynth.motion.heads import reduce_heads
from diffsynth.motion.losses import amf_loss, pair_weights
from diffsynth.motion.released import ReleasedFlow, released_tile_flow
from diffsynth.motion.tile_flow import TileFlow, tile_motion_flow

logger = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor]


def attention_features(
    latents: Tensor, context: Tensor, inputs: StepInputs, guidance: MotionGuidance
) -> Features:
    """Queries and keys [F, H, W, n, d] of the block that `guidance` reads, for latents [1, C, F, h, w]."""
    block = guidance.block_for(inputs.dit.num_layers)
    q, k = inputs.dit.features(
        latents,
        inputs.timestep,
        context,
        block=block,
        checkpoint_blocks=guidance.checkpoint in ("block", "offload"),
        offload_inputs=guidance.checkpoint == "offload",
        attention_window=guidance.attention_window,
    )
    return q[0], k[0]


@dataclass(frozen=True, slots=True)
class TileAMF:
    """Tile flow; the generated side looks into the windows that were found on the reference."""

    guidance: MotionGuidance

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Features:
        return attention_features(latents, context, inputs, self.guidance)

    def describe(self, features: Features, reference: TileFlow | None = None) -> TileFlow:
        g = self.guidance
        windows = None if reference is None else reference.windows
        described = tile_motion_flow(
            *features,
            sf=g.sf,
            window=g.window,
            tile=g.tile,
            tau=g.tau,
            windows=windows,
            heads=g.heads,
            chunk=g.chunk,
        )
        if reference is None and g.window_weight > 0:
            _say_if_windows_have_no_course(described.pairs[-1][0] + 1, g.sf)
        return described

    def loss(self, descriptor: TileFlow, reference: TileFlow) -> Loss:
        return _windowed_loss(descriptor, reference, self.guidance)


@dataclass(frozen=True, slots=True)
class ReleasedTileAMF:
    """Tile flow as the released code has it: each side looks into windows of its own."""

    guidance: MotionGuidance

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Features:
        return attention_features(latents, context, inputs, self.guidance)

    def describe(self, features: Features, reference: ReleasedFlow | None = None) -> ReleasedFlow:  # noqa: ARG002
        g = self.guidance
        q, k = reduce_heads(*features, g.heads)
        return released_tile_flow(q, k, sf=g.sf, window=g.window, tile=g.tile, tau=g.tau, chunk=g.chunk)

    def loss(self, descriptor: ReleasedFlow, reference: ReleasedFlow) -> Loss:
        return _windowed_loss(descriptor, reference, self.guidance)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseFlow:
    """flow [P, H, W, 2], (drow, dcol) in tokens; pairs, its P pairs of frames."""

    flow: Tensor
    pairs: Pairs


@dataclass(frozen=True, slots=True)
class DenseAMF:
    """Dense flow: no windows, so no window loss."""

    guidance: MotionGuidance

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Features:
        return attention_features(latents, context, inputs, self.guidance)

    def describe(self, features: Features, reference: DenseFlow | None = None) -> DenseFlow:  # noqa: ARG002
        pairs = frame_pairs(len(features[0]), self.guidance.sf)
        return DenseFlow(flow=_dense(features, self.guidance), pairs=pairs)

    def loss(self, descriptor: DenseFlow, reference: DenseFlow) -> Loss:
        amf = _amf(descriptor, reference, self.guidance)
        return Loss(self.guidance.amf_weight * amf, {"amf": amf.detach()})


def _dense(features: Features, g: MotionGuidance) -> Tensor:
    return attention_motion_flow(*features, sf=g.sf, tau=g.tau, heads=g.heads, chunk=g.chunk)


def _amf(
    descriptor: TileFlow | ReleasedFlow | DenseFlow,
    reference: TileFlow | ReleasedFlow | DenseFlow,
    g: MotionGuidance,
) -> Tensor:
    """Squared distance in full-size tokens, so that the weights mean the same on a coarse grid."""
    weights = pair_weights(descriptor.pairs, g.sf, g.pair_weights, g.intra_weight)
    return amf_loss(descriptor.flow, reference.flow, [g.coarse**2 * w for w in weights], g.token_scale)


def _windowed_loss(
    descriptor: TileFlow | ReleasedFlow, reference: TileFlow | ReleasedFlow, g: MotionGuidance
) -> Loss:
    amf, window = _amf(descriptor, reference, g), descriptor.window_loss
    return Loss(
        g.amf_weight * amf + g.window_weight * window, {"amf": amf.detach(), "window": window.detach()}
    )


@lru_cache
def _say_if_windows_have_no_course(num_frames: int, sf: int) -> None:
    """Cached, so that a combination is mentioned once."""
    if min(num_frames, sf) <= 2:
        logger.info(
            "the window loss is 0: it needs two later frames, and there are %d latent frames with sf=%d",
            num_frames,
            sf,
        )
