"""The motion descriptors by the name of their mode, and what callers need to know of each without loading it.

A new descriptor is a file in `diffsynth/motion` and an entry here; every command, the page, plans and
`benchmarks.quality` then know it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

DEFAULT_MODE = "effi_AMF"
NO_TRANSFER = "No_transfer"


@dataclass(frozen=True, kw_only=True, slots=True)
class Descriptor:
    """Facts about a motion descriptor.

    Attributes:
        make: the class, called with a `MotionGuidance`, or its path, "package.module:Class".
        help: noun phrase that names the matched features; inserted into help texts.
        reads_attention: it reads queries and keys of a block, so that attention_window and coarse apply.
        needs_backward: its gradient passes through the DiT, which has to keep activations for it.
        has_flow: its description has a `flow` [P, H, W, 2] that can be drawn.
        numbers: published settings that differ from the defaults of `MotionGuidance`.
        released: like `make`, for variant "released"; None if the variant does not exist.
    """

    make: str | Callable[..., Any]
    help: str
    reads_attention: bool = True
    needs_backward: bool = True
    has_flow: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    released: str | None = None


DESCRIPTORS: dict[str, Descriptor] = {
    "effi_AMF": Descriptor(
        make="diffsynth.motion.amf:TileAMF",
        help="attention motion flow in a window around each tile (FastVMT)",
        has_flow=True,
        released="diffsynth.motion.amf:ReleasedTileAMF",
    ),
    "AMF": Descriptor(
        make="diffsynth.motion.amf:DenseAMF", help="dense attention motion flow", has_flow=True
    ),
    "FlowMotion": Descriptor(
        make="diffsynth.motion.latent_prediction:LatentPrediction",
        help="predicted clean latents (FlowMotion, CVPR 2026)",
        reads_attention=False,
        needs_backward=False,
        # Three steps of plain Adam at one rate, each on a fresh gradient.
        numbers={"inner_steps": 3, "interval": 1, "lr": (0.003, 0.003), "weight_decay": 0.0},
    ),
}


def flow_modes() -> tuple[str, ...]:
    """Return the modes whose motion can be drawn as a flow."""
    return tuple(mode for mode, descriptor in DESCRIPTORS.items() if descriptor.has_flow)
