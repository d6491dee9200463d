"""Attention motion flow as a descriptor: tile ("effi_AMF"), dense ("AMF") and as released.

loss = amf_weight * amf + window_weight * window      (paper section 3.3; `losses`)
"""

import logging
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from diffsynth.configs.guidance import MotionGuidance
from diffsynth.motion.descriptors import Loss, StepInputs
from diffsynth.motion.flow import MotionFlow, Pairs, attention_motion_flow, frame_pairs
from diffsynth.motion.heads import reduce_heads
from diffsynth.motion.losses import amf_loss, pair_weights
from diffsynth.motion.released import released_tile_flow
from diffsynth.motion.tile_flow import TileFlow, tile_motion_flow

logger = logging.getLogger(__name__)

Features = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class DenseAMF:
    """Dense flow: no windows, so no window loss."""

    guidance: MotionGuidance

    def observe(self, latents: Tensor, context: Tensor, inputs: StepInputs) -> Features:
        """Return queries and keys [F, H, W, n, d] of the block that guidance reads."""
        g = self.guidance
        q, k = inputs.dit.features(
            latents,
            context=context,
            **inputs.of_dit(latents),
            block=g.block_for(inputs.dit.num_layers),
            checkpoint="none" if g.checkpoint == "auto" else g.checkpoint,
            attention_window=g.attention_window,
        )
        return q[0], k[0]

    def describe(
        self, features: Features, _reference: MotionFlow | None = None, pairs: Pairs | None = None
    ) -> MotionFlow:
        """Return the flow of the pairs, by default of all within sf frames."""
        g = self.guidance
        pairs = frame_pairs(len(features[0]), g.sf) if pairs is None else pairs
        flow = attention_motion_flow(*features, pairs=pairs, tau=g.tau, heads=g.heads, chunk=g.chunk)
        return MotionFlow(flow=flow, pairs=pairs)

    def loss(self, descriptor: MotionFlow, reference: MotionFlow) -> Loss:
        """Return the loss; distances in full-size tokens, so that weights mean the same on a coarse grid."""
        g, window = self.guidance, descriptor.window_loss
        weights = pair_weights(descriptor.pairs, g.sf, g.pair_weights, g.intra_weight)
        amf = amf_loss(descriptor.flow, reference.flow, [g.coarse**2 * w for w in weights], g.token_scale)
        if window is None:
            return Loss(g.amf_weight * amf, {"amf": amf.detach()})
        total = g.amf_weight * amf + g.window_weight * window
        return Loss(total, {"amf": amf.detach(), "window": window.detach()})


class TileAMF(DenseAMF):
    """Tile flow; the generated side looks into the windows that were found on the reference."""

    def describe(
        self, features: Features, reference: MotionFlow | None = None, pairs: Pairs | None = None
    ) -> TileFlow:
        g = self.guidance
        described = tile_motion_flow(
            *features,
            sf=g.sf,
            pairs=pairs,
            window=g.window,
            tile=g.tile,
            tau=g.tau,
            windows=reference if isinstance(reference, TileFlow) else None,
            heads=g.heads,
            chunk=g.chunk,
        )
        if reference is None and g.window_weight > 0:
            _say_if_windows_have_no_course(described.pairs[-1][0] + 1, g.sf)
        return described


class ReleasedTileAMF(DenseAMF):
    """Tile flow as the released code has it: each side looks into its own windows."""

    def describe(self, features: Features, *_: object) -> MotionFlow:
        g = self.guidance
        q, k = reduce_heads(*features, g.heads)
        return released_tile_flow(q, k, sf=g.sf, window=g.window, tile=g.tile, tau=g.tau, chunk=g.chunk)


@lru_cache
def _say_if_windows_have_no_course(num_frames: int, sf: int) -> None:
    """Cached, so that a combination is mentioned once."""
    if min(num_frames, sf) <= 2:
        logger.info(
            "the window loss is 0: it needs two later frames, and there are %d latent frames with sf=%d",
            num_frames,
            sf,
        )
