"""Published numbers of step caches: TeaCache's polynomials, MagCache's ratios of residuals from step to step.

Ratios of another checkpoint are measured by `calibrate_magcache`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

PROMPTS = ("positive", "negative")


@dataclass(frozen=True, slots=True)
class MagRatios:
    """Mean |residual| of each step over that of the step before, of each prompt of a run; the first is 1.

    Attributes:
        positive: ratios of the positive prompt.
        negative: ratios of the negative prompt; None for the positive's, within 1 % of them where published.

    Raises:
        ValueError: entries that are no finite numbers above 0, or lists of different lengths.
    """

    positive: tuple[float, ...]
    negative: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in PROMPTS:
            ratios = getattr(self, name)
            if ratios is None and name == "negative":
                continue
            if not isinstance(ratios, tuple) or not ratios or not all(_is_ratio(r) for r in ratios):
                raise ValueError(f"MagCache ratios: {name} must be finite and above 0; got {ratios!r:.80}")
        if self.negative is not None and len(self.negative) != len(self.positive):
            counts = f"{len(self.positive)} positive and {len(self.negative)} negative"
            raise ValueError(f"MagCache ratios: {counts} ones; both must be of one run")

    @classmethod
    def from_json(cls, declared: Any) -> "MagRatios":
        """Return the ratios in {"positive": [...], "negative": [...]}.

        Raises:
            ValueError: `declared` has another form.
        """
        if not isinstance(declared, Mapping) or not {"positive"} <= declared.keys() <= set(PROMPTS):
            raise ValueError(f"MagCache ratios must hold positive, may hold negative; got {declared!r:.80}")
        return cls(**{name: tuple(r) if isinstance(r, list) else r for name, r in declared.items()})

    def of(self, prompt: str, num_steps: int) -> tuple[float, ...]:
        """Return a prompt's ratios for a number of steps, each the nearest, as in the published code."""
        ratios = self.negative if prompt == "negative" and self.negative is not None else self.positive
        if num_steps == 1:
            return ratios[-1:]
        scale = (len(ratios) - 1) / (num_steps - 1)
        return tuple(ratios[round(i * scale)] for i in range(num_steps))


def _is_ratio(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


# Which of the models below a text-to-video DiT is, by its width.
MODEL_OF_DIT_DIM = {1536: "Wan2.1-T2V-1.3B", 5120: "Wan2.1-T2V-14B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaCacheModel:
    """TeaCache4Wan2.1's numbers for one model, the set fitted with e0 as the input (use_ret_steps)."""

    coefficients: tuple[float, float, float, float, float]  # of the relative change of e0, fourth power first
    thresholds: tuple[float, float]  # the range that the authors advise, from careful to fast


@cache
def tea_cache_models() -> dict[str, TeaCacheModel]:
    """Return the models whose polynomials are published, by name."""
    table = json.loads(Path(__file__).with_name("tea_cache.json").read_text())
    return {
        name: TeaCacheModel(coefficients=tuple(row["coefficients"]), thresholds=tuple(row["thresholds"]))
        for name, row in table.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheModel:
    """MagCache4Wan2.1's numbers for one model: ratios of 50 steps, threshold, most steps skipped.

    They were measured with sdpa attention; UniPC, shift 5, guidance 5 by default.
    """

    ratios: MagRatios
    threshold: float
    max_skip: int


@cache
def mag_cache_models() -> dict[str, MagCacheModel]:
    """Return the models whose ratios are published, by name."""
    table = json.loads(Path(__file__).with_name("mag_cache.json").read_text())
    for row in table.values():
        row["ratios"] = MagRatios.from_json({prompt: row.pop(prompt) for prompt in PROMPTS})
    return {name: MagCacheModel(**row) for name, row in table.items()}
