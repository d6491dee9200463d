"""The step caches by name, and which one a run uses, with its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffsynth.configs.cache_tables import MAG_CACHE_MODELS, MODEL_OF_DIT_DIM, TEA_CACHE_MODELS, MagRatios
from diffsynth.configs.fields import Choice, Number, Text, Whole, check_options, option

FIRST_BLOCK_THRESHOLD = 0.05  # the default of diffusers


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """Facts about a step cache.

    Attributes:
        rule: path of the class that decides, "package.module:Class"; see `caches.rules`.
        help: how it decides; part of a sentence.
        kept_tensors: tensors of the tokens' shape that it keeps of each prompt.
        by_count: it decides by the number of the step alone, so that what it skips is known beforehand.
    """

    rule: str
    help: str
    kept_tensors: int = 1
    by_count: bool = False


CACHES: dict[str, Cache] = {
    "teacache": Cache(
        rule="diffsynth.caches.tea_cache:TeaCache", help="by the change of the time embedding (TeaCache)"
    ),
    "magcache": Cache(
        rule="diffsynth.caches.mag_cache:MagCache",
        help="by ratios of residuals that were measured beforehand (MagCache)",
        by_count=True,
    ),
    "first_block": Cache(
        rule="diffsynth.caches.first_block_cache:FirstBlockCache",
        help="by the change of what the first block adds",
        kept_tensors=3,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A step cache and its numbers.

    Attributes:
        ratios: what MagCache decides by.

    Raises:
        ValueError: a number that is not allowed; the message names it.
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
            raise ValueError("MagCache needs ratios: measure them with calibrate_magcache")
        if self.name == "teacache" and self.model_id not in TEA_CACHE_MODELS:
            raise ValueError(
                f"tea_cache_model_id is {self.model_id!r}; it must be one of: {', '.join(TEA_CACHE_MODELS)}"
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CacheOptions":
        """Return the options that `dataclasses.asdict` made such a mapping of."""
        ratios = values.get("ratios")
        return cls(**{**values, "ratios": None if ratios is None else MagRatios.from_json(ratios)})


def choose_cache(
    name: str,
    threshold: float | None,
    dit_dim: int,
    declared_ratios: Mapping[str, Sequence[float]] | None = None,
    model_id: str = "",
) -> CacheOptions:
    """Return a step cache with the numbers that are published for a DiT of this width.

    Args:
        name: a key of `CACHES`.
        threshold: instead of the published one.
        dit_dim: width of the DiT.
        declared_ratios: MagCache's ratios that the checkpoint declares, instead of the published ones.
        model_id: whose coefficients TeaCache takes; by default by the width.

    Raises:
        ValueError: an unknown name, or nothing is published for this width.
    """
    known = MODEL_OF_DIT_DIM.get(dit_dim, "")
    if name == "teacache":
        model_id = model_id or known
        if not model_id:
            raise ValueError(
                f"no TeaCache coefficients are known for a DiT of width {dit_dim}; "
                f"pass tea_cache_model_id, one of: {', '.join(TEA_CACHE_MODELS)}"
            )
        if threshold is None and model_id in TEA_CACHE_MODELS:
            threshold = TEA_CACHE_MODELS[model_id].thresholds[0]
        return CacheOptions(name=name, threshold=threshold or 0.0, model_id=model_id)
    if name == "magcache":
        if known not in MAG_CACHE_MODELS and declared_ratios is None:
            raise ValueError(
                f"no MagCache ratios are known for a DiT of width {dit_dim}: measure them with "
                "calibrate_magcache and declare them in the checkpoint's config.json, or pass CacheOptions"
            )
        numbers = MAG_CACHE_MODELS.get(known, MAG_CACHE_MODELS["Wan2.1-T2V-1.3B"])
        return CacheOptions(
            name=name,
            threshold=numbers.threshold if threshold is None else threshold,
            ratios=numbers.ratios if declared_ratios is None else MagRatios.from_json(declared_ratios),
            max_skip=numbers.max_skip,
        )
    return CacheOptions(name=name, threshold=FIRST_BLOCK_THRESHOLD if threshold is None else threshold)
