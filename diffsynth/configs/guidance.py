"""Every number of motion transfer, with its bounds, its unit and its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.fields import Choice, Number, OrNone, Several, Whole, check_options, only_known, option

HEAD_READINGS = ("mean_qk", "mean_logits", "token_groups")
Heads = str | Sequence[int]
Window = tuple[int, int, int]
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
PAPER_BLOCK = 14
MOTION_BELOW = 0.95  # noise level; above it the probe sees hardly any motion in attention
LEAST_FADE = 1e-3  # a learning rate is above 0
_ROUNDING = 1e-6  # of a noise level, at a bound of `guided`
PAPER_DEPTHS = (30, 40)  # blocks of Wan2.1 1.3B and 14B; both are read at PAPER_BLOCK


class HeadsKind:
    """The name of a way to reduce attention heads, or the indices of one or more different heads."""

    metavar = "NAME|INDICES"

    def __str__(self) -> str:
        return f"one of {', '.join(HEAD_READINGS)} or different head indices"

    def read(self, text: str) -> Heads:
        return self.check([int(part) for part in text.split(",")] if text[:1].isdigit() else text)

    def check(self, value: Any) -> Heads:
        if isinstance(value, str):
            return Choice(HEAD_READINGS).check(value)
        heads = tuple(Whole(0).check(head) for head in value)
        if not 0 < len(heads) == len(set(heads)):
            raise ValueError
        return heads


HEADS = HeadsKind()
ATTENTION_WINDOW = Several(Whole(0), ("frames", "rows", "columns"))
SEARCH_WINDOW = Whole(1, odd=True)
TILE = Several(Whole(1), ("rows", "columns"))
TAU = Number(above=0)
_WEIGHT = Number(least=0)
_COSINE = OrNone(Number(least=-1, most=1))


def shifted_level(level: Any, shift: float) -> Any:
    """Return a noise level in 0..1, a number or a tensor of them, pushed towards noise by the shift."""
    return shift * level / (1.0 + (shift - 1.0) * level)


def changed_numbers(numbers: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers of motion with changes; a number of guided steps replaces a range of noise levels."""
    return {**numbers, **({"guided": None} if "guided_steps" in changes else {}), **changes}


def check_heads(heads: Heads, num_heads: int, tokens: tuple[int, int, int]) -> None:
    """Raise ValueError if heads do not fit a DiT of num_heads and its tokens (frames, rows, columns)."""
    if not isinstance(heads, str) and max(heads) >= num_heads:
        raise ValueError(f"heads must be in 0..{num_heads - 1} for this DiT; got {list(heads)}")
    frames, rows, cols = tokens
    if heads == "token_groups" and (frames * rows * cols) % num_heads:
        raise ValueError(
            f"heads='token_groups' needs a token count divisible by the {num_heads} heads; "
            f"got {frames} x {rows} x {cols} tokens"
        )


def check_coarse(factor: int, rows: int, cols: int) -> None:
    """Raise ValueError if latents of rows x cols cannot be averaged over squares of side factor."""
    if rows % factor or cols % factor:
        raise ValueError(
            f"coarse={factor} needs latents whose rows and columns are multiples of {factor}; "
            f"got {rows} x {cols}"
        )


def check_released(grid: tuple[int, ...], tile: tuple[int, int], window: int) -> None:
    """Raise ValueError if the released code cannot run on tokens (rows, columns)."""
    if any(side % step or side <= window // 2 for side, step in zip(grid, tile, strict=True)):
        raise ValueError(
            f"the released flow needs a token grid divisible by the tile {tile} with sides above "
            f"{window // 2}, half the window; got {grid}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionGuidance:
    """The numbers of motion transfer. Defaults are FastVMT's (arXiv 2602.05551, section 3, and its code).

    Lengths in tokens are counted on the grid that the DiT sees, which `coarse` makes coarser.

    Example: `pipe(..., motion=MotionGuidance(guided_steps=6))`; `motion={"guided_steps": 6}` keeps a model's.

    Raises:
        ValueError: a number is not allowed; the message names it.
    """

    # What is transferred
    mode: str = option(Choice(DESCRIPTORS), "the motion descriptor", default="effi_AMF")
    variant: str = option(
        Choice(("paper", "released")),
        "the paper's method, or the released code's departures from it",
        default="paper",
    )
    # Reading the DiT
    block: int | None = option(
        OrNone(Whole(0), "the published relative depth, round(14/30 * depth)"),
        "block whose queries and keys are read, from 0; 14 in a shorter DiT is the same relative depth",
        default=PAPER_BLOCK,
    )
    heads: Heads = option(HEADS, "how attention heads are reduced, or indices such as 0,3", default="mean_qk")
    checkpoint: str = option(
        Choice(("auto", "none", "attention", "block", "offload")),
        "activations kept for gradients: all (none), each block's input and self-attention (attention), its "
        "input (block), the same on the CPU (offload), or by the memory at hand (auto)",
        default="auto",
    )
    attention_window: Window | None = option(
        OrNone(ATTENTION_WINDOW, "all"), "tokens that self-attention sees to each side while motion is read"
    )
    coarse: int = option(
        Whole(1),
        "side of the squares of latents that are averaged before motion is read (see motion/coarse.py)",
        default=1,
    )
    # Flow, in tokens
    sf: int = option(Whole(2), "frames that each latent frame is compared with: i <= j < i + sf", default=4)
    window: int = option(SEARCH_WINDOW, "side of the search window, in tokens", default=21)
    tile: tuple[int, int] = option(TILE, "tokens that share a search window", default=(3, 4))
    tau: float = option(TAU, "factor on the attention logits", default=1.0)
    chunk: int = option(Whole(1), "frame pairs held in memory at a time", default=4)
    # Loss
    amf_weight: float = option(_WEIGHT, "weight of the motion flow loss", default=5.0)
    window_weight: float = option(_WEIGHT, "weight of the window loss", default=1.0)
    pair_weights: tuple[float, float] = option(
        Several(_WEIGHT, ("near", "far")),
        "weights of pairs j = i and j = i + sf - 1, linear between",
        default=(1.0, 0.8),
    )
    intra_weight: float = option(_WEIGHT, "factor on pairs of a frame with itself", default=1.0)
    token_scale: float | None = option(
        OrNone(Number(above=0), "the sum over tokens"),
        "factor on the mean over tokens (1560: the tokens of 480x832)",
        default=1560.0,
    )
    prediction_weight: float = option(_WEIGHT, "weight of predicted clean latents (FlowMotion)", default=20.0)
    difference_weight: float = option(_WEIGHT, "weight of their frame differences (FlowMotion)", default=5.0)
    prediction_cfg: float = option(_WEIGHT, "guidance scale of the prediction (FlowMotion)", default=6.0)
    across_velocity: float = option(
        _WEIGHT, "share of the velocity kept across the mean velocity so far (FlowMotion)", default=0.1
    )
    # Optimiser
    guided_steps: int = option(Whole(0, 1000), "denoising steps that are guided", default=10)
    first_guided: int = option(Whole(0), "denoising steps before the first guided one", default=0)
    guided: tuple[float, float] | None = option(
        OrNone(Several(Number(least=0, most=1), ("from", "to")), "guided_steps"),
        "noise levels, falling, in which steps are guided: then first_guided and guided_steps follow",
    )
    inner_steps: int = option(Whole(1, 1000), "optimiser steps in each guided step", default=10)
    interval: int = option(
        Whole(1), "inner steps from one fresh gradient to the next; those between reuse it", default=3
    )
    reuse: str = option(
        Choice(("repeat", "falling", "extrapolate")),
        "how a gradient is reused: as published (repeat), with falling steps, or extrapolated",
        default="repeat",
    )
    reuse_above: float | None = option(
        _COSINE, "reuse only while the last two fresh gradients have this cosine; None: always"
    )
    update: str = option(
        Choice(("adamw", "gradient")), "AdamW as published, or plain descent (gradient)", default="adamw"
    )
    lr: tuple[float, float] = option(
        Several(Number(above=0), ("first", "end")),
        "learning rate, linear over the inner steps; the end is not reached",
        default=(0.003, 0.002),
    )
    fade: float = option(
        _WEIGHT,
        "factor on lr at the end of the guided steps, or of `guided`, linear from 1 at the first",
        default=1.0,
    )
    weight_decay: float = option(_WEIGHT, "weight decay of an inner step, times lr", default=0.01)
    recompute_every: int = option(
        Whole(1), "guided steps from one that computes gradients to the next; those between repeat them",
        default=1,
    )  # fmt: skip
    recompute_below: float | None = option(
        _COSINE,
        "compute the next step's gradients too while those of the last two that did have a lower cosine; "
        "None: never",
    )

    def __post_init__(self) -> None:
        check_options(self)
        descriptor = DESCRIPTORS[self.mode]
        if self.guided is not None and self.guided[0] < self.guided[1]:
            raise ValueError(f"guided must be (from, to), falling noise levels; got {self.guided!r}")
        if self.variant == "released" and descriptor.released is None:
            known = ", ".join(mode for mode, other in DESCRIPTORS.items() if other.released)
            raise ValueError(f"variant 'released' exists for mode {known} only; got mode {self.mode!r}")
        if not descriptor.reads_attention and (self.attention_window is not None or self.coarse > 1):
            raise ValueError(
                f"attention_window and coarse are for modes that read attention; mode {self.mode!r} does "
                f"not, got attention_window={self.attention_window!r}, coarse={self.coarse!r}"
            )

    @classmethod
    def released(cls, **changes: Any) -> "MotionGuidance":
        """Return the numbers of the released code, with its features, windows, displacements and loss.

        Args:
            changes: fields to override; heads="mean_qk" repairs its scrambled features and nothing else.
        """
        return replace(cls(variant="released", heads="token_groups", token_scale=None), **changes)

    @classmethod
    def for_mode(cls, mode: str, numbers: Mapping[str, Any] = NO_CHANGES) -> "MotionGuidance":
        """Return the published numbers of a mode.

        Args:
            mode: a key of `DESCRIPTORS`.
            numbers: fields to override; JSON's lists may stand for tuples.

        Raises:
            ValueError: the mode or a field is unknown, or a number is not allowed.
        """
        only_known(numbers, cls, "motion")
        published = DESCRIPTORS[mode].numbers if mode in DESCRIPTORS else NO_CHANGES
        return cls(**{"mode": mode, **published, **numbers})

    def guided_range(self, num_steps: int) -> range:
        """Return the indices of the guided steps, of `num_steps`."""
        return range(num_steps)[self.first_guided : self.first_guided + self.guided_steps]

    def placed(self, levels: Sequence[float]) -> "MotionGuidance":
        """Return the guidance whose guided steps are those of a run's noise levels within `guided`.

        Raises:
            ValueError: none of the levels is.
        """
        if self.guided is None:
            return self
        high, low = self.guided
        inside = [i for i, s in enumerate(levels) if low - _ROUNDING <= s <= high + _ROUNDING]
        if not inside:
            raise ValueError(
                f"no step lies within guided={self.guided}: the run's noise levels are "
                f"{', '.join(f'{level:.3f}' for level in levels)}"
            )
        return replace(self, first_guided=inside[0], guided_steps=len(inside))

    @property
    def descriptor(self) -> Any:
        """The class of the descriptor, or its path, by mode and variant."""
        facts = DESCRIPTORS[self.mode]
        return facts.released if self.variant == "released" else facts.make

    def faded(self, step: int, level: float) -> "MotionGuidance":
        """Return the numbers for a denoising step, faded by `fade`.

        Args:
            step: index of the step, from 0.
            level: noise level of the step, in 0..1.
        """
        done = (step - self.first_guided) / max(self.guided_steps, 1)
        if self.guided is not None and self.guided[0] > self.guided[1]:
            done = min(max((self.guided[0] - level) / (self.guided[0] - self.guided[1]), 0.0), 1.0)
        factor = max(1 - (1 - self.fade) * done, LEAST_FADE)
        return self if factor == 1 else self.scaled(factor)

    def scaled(self, factor: float) -> "MotionGuidance":
        """Return the same numbers with both learning rates times `factor`."""
        return replace(self, lr=(factor * self.lr[0], factor * self.lr[1]))

    def block_for(self, num_layers: int) -> int:
        """Return the block to read in a DiT of `num_layers` blocks; ValueError if there is no such block."""
        scaled = PAPER_BLOCK if num_layers in PAPER_DEPTHS else round(PAPER_BLOCK / 30 * num_layers)
        if self.block is None or (self.block == PAPER_BLOCK >= num_layers and self.variant == "paper"):
            return min(scaled, num_layers - 1)
        if self.block >= num_layers:
            raise ValueError(f"block must be in 0..{num_layers - 1} for this DiT; got {self.block}")
        return self.block
