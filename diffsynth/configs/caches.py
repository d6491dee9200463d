"""The step caches by name, and which one a run uses, with its numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsynth.configs.cache_tables import MODEL_OF_DIT_DIM, MagRatios, mag_cache_models, tea_cache_models
from diffsynth.configs.fields import Choice, Number, Text, Whole, check_options, check_value, option

Ratios = Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Facts about a step cache. A new cache is a file in `diffsynth/caches` and an entry in `CACHES`.

    Attributes:
        rule: path of the class that decides, "package.module:Class"; see `caches.rules`.
        help: how it decides; part of a sentence.
        numbers: function of (width of the DiT, ratios that the checkpoint declares, requested model id) that
            returns the published fields of `CacheOptions`.
        kept_tensors: number of tensors of the tokens' shape that it keeps for each prompt.
        by_count: it decides by the index of the step alone, so that the skipped steps are known beforehand.
    """

    rule: str
    help: str
    numbers: Callable[[int, Ratios | None, str], dict[str, Any]]
    kept_tensors: int = 1
    by_count: bool = False


def _tea_cache(dit_dim: int, _declared: Ratios | None, model_id: str) -> dict[str, Any]:
    model_id = model_id or MODEL_OF_DIT_DIM.get(dit_dim, "")
    if model_id not in tea_cache_models():
        known = ", ".join(tea_cache_models())
        if model_id:
            raise ValueError(f"tea_cache_model_id is {model_id!r}; it must be one of: {known}")
        raise ValueError(
            f"no TeaCache coefficients are known for a DiT of width {dit_dim}; "
            f"pass tea_cache_model_id, one of: {known}"
        )
    return {"model_id": model_id, "threshold": tea_cache_models()[model_id].thresholds[0]}


def _mag_cache(dit_dim: int, declared: Ratios | None, _model_id: str) -> dict[str, Any]:
    known = MODEL_OF_DIT_DIM.get(dit_dim)
    if known is None and declared is None:
        raise ValueError(
            f"no MagCache ratios are known for a DiT of width {dit_dim}: measure them with "
            "benchmarks/mag_calibration.py and declare them in its config.json, or pass CacheOptions"
        )
    published = mag_cache_models()[known or "Wan2.1-T2V-1.3B"]
    ratios = published.ratios if declared is None else MagRatios.from_json(declared)
    return {"threshold": published.threshold, "ratios": ratios, "max_skip": published.max_skip}


CACHES: dict[str, Cache] = {
    "teacache": Cache(
        rule="diffsynth.caches.tea_cache:TeaCache",
        help="by the change of the time embedding (TeaCache)",
        numbers=_tea_cache,
    ),
    "magcache": Cache(
        rule="diffsynth.caches.mag_cache:MagCache",
        help="by ratios of residuals that were measured beforehand (MagCache)",
        numbers=_mag_cache,
        by_count=True,
    ),
    "first_block": Cache(
        rule="diffsynth.caches.first_block_cache:FirstBlockCache",
        help="by the change of what the first block adds",
        numbers=lambda *_: {"threshold": 0.05},  # the default of diffusers
        kept_tensors=3,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A step cache and its numbers.

    Attributes:
        ratios: ratios of residuals, which MagCache needs.

    Raises:
        ValueError: a number is not allowed; the message names it.
    """

    name: str = option(Choice(CACHES), "the step cache", default="magcache")
    threshold: float = option(
        Number(least=0), "sum of estimated changes at which blocks run again; 0 never skips", default=0.0
    )
    model_id: str = option(Text(), "whose coefficients TeaCache takes", default="")
    ratios: MagRatios | None = field(default=None, repr=False)
    max_skip: int = option(Whole(1), "steps in a row that MagCache skips at most", default=4)
    retention: float = option(
        Number(least=0, most=1), "share of the steps, from the first, that MagCache never skips", default=0.2
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.name == "magcache" and self.ratios is None:
            raise ValueError("MagCache needs ratios: measure them with benchmarks/mag_calibration.py")
        if self.name == "teacache":
            _tea_cache(0, None, self.model_id)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CacheOptions":
        """Return the options in a mapping that `dataclasses.asdict` made."""
        ratios = values.get("ratios")
        return cls(**{**values, "ratios": None if ratios is None else MagRatios.from_json(ratios)})


def choose_cache(
    name: str,
    threshold: float | None,
    dit_dim: int,
    declared_ratios: Ratios | None = None,
    model_id: str = "",
) -> CacheOptions:
    """Return a step cache with the numbers that are published for a DiT of this width.

    A threshold and the ratios that a checkpoint declares for MagCache replace the published ones. TeaCache
    takes the coefficients of the model `model_id`, by default of the one of this width.

    Raises:
        ValueError: the name is unknown, or nothing is published for this width.
    """
    numbers = CACHES[check_value("cache", Choice(CACHES), name)].numbers(dit_dim, declared_ratios, model_id)
    asked = {} if threshold is None else {"threshold": threshold}
    return CacheOptions(name=name, **{**numbers, **asked})
