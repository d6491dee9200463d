"""Published numbers of step caches: TeaCache's polynomials, MagCache's ratios of residuals from step to step.

Ratios of another checkpoint are measured by `calibrate_magcache`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROMPTS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class MagRatios:
    """Mean |residual| of each step over that of the step before, of each prompt of a run; the first is 1.

    negative: None takes those of the positive prompt; in the published tables they are within 1 %. Raises
    ValueError for entries that are no finite numbers above 0, and for two lists of different lengths.
    """

    positive: tuple[float, ...]
    negative: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in PROMPTS:
            ratios = getattr(self, name)
            if ratios is None and name == "negative":
                continue
            if not isinstance(ratios, tuple) or not ratios or not all(_is_ratio(r) for r in ratios):
                raise ValueError(
                    f"MagCache ratios: {name} must be finite numbers above 0; got {ratios!r:.80}"
                )
        if self.negative is not None and len(self.negative) != len(self.positive):
            counts = f"{len(self.positive)} positive and {len(self.negative)} negative"
            raise ValueError(f"MagCache ratios: {counts} ones; both must be of one run")

    @classmethod
    def from_json(cls, declared: Any) -> "MagRatios":
        """From {"positive": [...], "negative": [...]}, as `to_json` gives. Raises ValueError for others."""
        if not isinstance(declared, Mapping) or not {"positive"} <= declared.keys() <= set(PROMPTS):
            raise ValueError(
                f"MagCache ratios must hold positive and may hold negative; got {declared!r:.80}"
            )
        return cls(**{name: tuple(r) if isinstance(r, list) else r for name, r in declared.items()})

    def to_json(self) -> dict[str, list[float]]:
        """What `json.dump` takes, and a checkpoint's config.json under "fastvmt": {"mag_ratios": ...}."""
        lists = {name: getattr(self, name) for name in PROMPTS}
        return {name: list(ratios) for name, ratios in lists.items() if ratios is not None}

    def of(self, prompt: str) -> tuple[float, ...]:
        """The ratios of "positive" or "negative"."""
        return self.negative if prompt == "negative" and self.negative is not None else self.positive

    def for_steps(self, num_steps: int) -> "MagRatios":
        """For a run of another number of steps, as published: each step takes the nearest one's ratio."""
        negative = None if self.negative is None else _nearest(self.negative, num_steps)
        return MagRatios(_nearest(self.positive, num_steps), negative)


def _nearest(ratios: tuple[float, ...], count: int) -> tuple[float, ...]:
    if count == 1:
        return ratios[-1:]
    scale = (len(ratios) - 1) / (count - 1)
    return tuple(ratios[round(i * scale)] for i in range(count))


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# Which of the models below a text-to-video DiT is, by its width.
MODEL_OF_DIT_DIM = {1536: "Wan2.1-T2V-1.3B", 5120: "Wan2.1-T2V-14B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCacheModel:
    """What TeaCache knows of one model.

    coefficients: polynomial of the relative change of e0, fourth power first.
    thresholds: the range that the authors advise, from careful to fast.
    source: where the numbers come from.
    """

    coefficients: tuple[float, float, float, float, float]
    thresholds: tuple[float, float]
    source: str = "TeaCache4Wan2.1, the set fitted with e0 as the input (use_ret_steps)"


TEA_CACHE_MODELS = {
    "Wan2.1-T2V-1.3B": TeaCacheModel(
        coefficients=(-5.21862437e4, 9.23041404e3, -5.28275948e2, 1.36987616e1, -4.99875664e-2),
        thresholds=(0.05, 0.08),
    ),
    "Wan2.1-T2V-14B": TeaCacheModel(
        coefficients=(-3.03318725e5, 4.90537029e4, -2.65530556e3, 5.87365115e1, -3.15583525e-1),
        thresholds=(0.14, 0.2),
    ),
    "Wan2.1-I2V-14B-480P": TeaCacheModel(
        coefficients=(2.57151496e5, -3.54229917e4, 1.40286849e3, -1.35890334e1, 1.32517977e-1),
        thresholds=(0.13, 0.26),
    ),
    "Wan2.1-I2V-14B-720P": TeaCacheModel(
        coefficients=(8.10705460e3, 2.13393892e3, -3.72934672e2, 1.66203073e1, -4.17769401e-2),
        thresholds=(0.18, 0.3),
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheModel:
    """What is published of one model: ratios of 50 steps from pure noise, threshold, most steps skipped."""

    ratios: MagRatios
    threshold: float
    max_skip: int
    source: str = "MagCache4Wan2.1, measured with sdpa attention; UniPC, shift 5, guidance 5 by default"


# fmt: off
MAG_CACHE_MODELS = {
    "Wan2.1-T2V-1.3B": MagCacheModel(
        threshold=0.12,
        max_skip=4,
        ratios=MagRatios(
            positive=(
                1.0, 1.0124, 1.00166, 0.99791, 0.99682, 0.99634, 0.99567, 0.99416, 0.99578, 0.9957, 0.99511,
                0.99535, 0.99552, 0.99541, 0.9954, 0.99489, 0.99518, 0.99484, 0.99481, 0.99415, 0.99419,
                0.99396, 0.99388, 0.99349, 0.99309, 0.9927, 0.99228, 0.99171, 0.99137, 0.99068, 0.99005,
                0.98944, 0.98849, 0.98758, 0.98644, 0.98504, 0.9836, 0.98202, 0.97977, 0.97717, 0.9741,
                0.97003, 0.96538, 0.9593, 0.95086, 0.94013, 0.92402, 0.90241, 0.86821, 0.81838,
            ),
            negative=(
                1.0, 1.02213, 1.0041, 1.00061, 0.99762, 0.99685, 0.99586, 0.99422, 0.99575, 0.99563,
                0.99506, 0.99531, 0.99549, 0.99539, 0.99536, 0.99485, 0.99514, 0.99478, 0.99479, 0.99413,
                0.99416, 0.99393, 0.99386, 0.99349, 0.99304, 0.9927, 0.99226, 0.9917, 0.99135, 0.99063,
                0.99003, 0.98942, 0.98849, 0.98757, 0.98643, 0.98503, 0.98359, 0.98201, 0.97978, 0.97718,
                0.97411, 0.97002, 0.96541, 0.95933, 0.95089, 0.94019, 0.92414, 0.9026, 0.86868, 0.81939,
            ),
        ),
    ),
    "Wan2.1-T2V-14B": MagCacheModel(
        threshold=0.24,
        max_skip=6,
        ratios=MagRatios(
            positive=(
                1.0, 1.02504, 1.00025, 0.9985, 0.99779, 0.9966, 0.99482, 0.99467, 0.99664, 0.99434, 0.99533,
                0.99468, 0.99438, 0.99516, 0.99384, 0.99404, 0.99517, 0.99409, 0.99428, 0.99347, 0.99418,
                0.99271, 0.99313, 0.99215, 0.99218, 0.99216, 0.99163, 0.99138, 0.98982, 0.98996, 0.9887,
                0.98772, 0.98767, 0.98573, 0.98501, 0.9838, 0.98177, 0.98037, 0.97678, 0.97546, 0.97184,
                0.96711, 0.96349, 0.95629, 0.94926, 0.93964, 0.92511, 0.90693, 0.8796, 0.86111,
            ),
            negative=(
                1.0, 1.03017, 1.00251, 0.99962, 0.99771, 0.99658, 0.99476, 0.99451, 0.99656, 0.99431,
                0.99545, 0.99465, 0.99434, 0.99517, 0.9938, 0.99401, 0.99516, 0.99408, 0.99426, 0.99343,
                0.99416, 0.99269, 0.99311, 0.99215, 0.99215, 0.99217, 0.99161, 0.99135, 0.9898, 0.98995,
                0.98866, 0.9877, 0.98765, 0.9857, 0.98498, 0.98376, 0.98173, 0.98035, 0.97677, 0.97543,
                0.97183, 0.96708, 0.96345, 0.95625, 0.94929, 0.93961, 0.92504, 0.90678, 0.87945, 0.86189,
            ),
        ),
    ),
}
# fmt: on
