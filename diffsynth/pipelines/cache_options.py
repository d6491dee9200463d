"""Which step cache a run uses, with its numbers: TeaCache, MagCache or first-block cache."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffsynth.configs.defaults import RunDefaults
from diffsynth.pipelines.first_block_cache import FIRST_BLOCK_THRESHOLD, FirstBlockCache
from diffsynth.pipelines.mag_cache import MagCache
from diffsynth.pipelines.mag_ratios import MAG_CACHE_MODELS, MagRatios
from diffsynth.pipelines.step_cache import CacheMaker, StepCache
from diffsynth.pipelines.tea_cache import TEA_CACHE_MODELS, TeaCache, tea_cache_model_id

logger = logging.getLogger(__name__)

CACHES = ("teacache", "magcache", "first_block")
# The published MagCache tables by width of the DiT.
_MAG_MODEL_OF_DIT_DIM = {1536: "Wan2.1-T2V-1.3B", 5120: "Wan2.1-T2V-14B"}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheOptions:
    """A step cache and its numbers; None for its model's published ones (see `choose_cache`).

    name: one of CACHES. threshold: of what the cache adds up; 0 never skips. model_id: of TeaCache's
    coefficients. ratios, max_skip, retention: of MagCache. Raises ValueError, naming it, for a number that
    is not allowed.
    """

    name: str
    threshold: float
    model_id: str = ""
    ratios: MagRatios | None = field(default=None, repr=False)
    max_skip: int = 4
    retention: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in CACHES:
            raise ValueError(f"cache must be one of {', '.join(CACHES)}; got {self.name!r}")
        if self.name == "magcache" and self.ratios is None:
            raise ValueError("MagCache needs ratios: measure them with calibrate_magcache")
        # Made once, so that the numbers are checked before any model runs.
        self.make("positive", range(1), 1)

    def make(self, prompt: str, steps: range, num_steps: int) -> StepCache:
        """A new rule for one prompt, "positive" or "negative", run at these of the run's num_steps steps."""
        if self.name == "teacache":
            return TeaCache(len(steps), self.threshold, self.model_id)
        if self.name == "first_block":
            return FirstBlockCache(self.threshold)
        return MagCache(
            self.ratios.for_steps(num_steps).of(prompt),
            self.threshold,
            max_skip=self.max_skip,
            retention=self.retention,
            first_step=steps.start,
        )


def choose_cache(
    cache: str | CacheMaker | None,
    threshold: float | None,
    dit_dim: int,
    declared_ratios: Mapping[str, Sequence[float]] | None = None,
    tea_cache_l1_thresh: float | None = None,
    tea_cache_model_id: str = "",
) -> CacheMaker | None:
    """The step cache that the arguments of a run ask for together; None for none.

    cache: a name of CACHES, whose published numbers are taken for the DiT's width; or options made
    elsewhere. threshold: instead of the published one. declared_ratios: what the checkpoint says of MagCache.
    tea_cache_l1_thresh: a threshold that by itself means "teacache". Raises ValueError for arguments that
    contradict one another, and where nothing is published for this width.
    """
    if tea_cache_l1_thresh is not None:
        if cache not in (None, "teacache") or threshold is not None:
            raise ValueError(
                f"tea_cache_l1_thresh={tea_cache_l1_thresh!r} is TeaCache's threshold; it contradicts "
                f"cache={cache!r}, cache_threshold={threshold!r}"
            )
        cache, threshold = "teacache", tea_cache_l1_thresh
    if cache is None:
        if threshold is not None:
            raise ValueError(f"cache_threshold={threshold!r} needs cache, one of {', '.join(CACHES)}")
        return None
    if not isinstance(cache, str):
        if threshold is not None or not hasattr(cache, "make"):
            raise ValueError(
                f"cache must be one of {', '.join(CACHES)} or CacheOptions, which have their own threshold; "
                f"got cache={cache!r:.80}, cache_threshold={threshold!r}"
            )
        return cache
    if cache == "teacache":
        return _tea_cache(threshold, tea_cache_model_id, dit_dim)
    if cache == "magcache":
        return _mag_cache(threshold, declared_ratios, dit_dim)
    return CacheOptions(name=cache, threshold=FIRST_BLOCK_THRESHOLD if threshold is None else threshold)


def choose_run_cache(
    usual: RunDefaults,
    dit_dim: int,
    cache: str | CacheMaker | None,
    threshold: float | None,
    tea_cache_l1_thresh: float | None,
    tea_cache_model_id: str,
) -> CacheMaker | None:
    """As `choose_cache`; without any argument, the cache of the checkpoint's defaults or the preset, if its
    numbers are known for this model.
    """
    if (cache, threshold, tea_cache_l1_thresh) != (None, None, None):
        return choose_cache(
            cache, threshold, dit_dim, usual.mag_ratios, tea_cache_l1_thresh, tea_cache_model_id
        )
    try:
        return choose_cache(usual.cache, usual.cache_threshold, dit_dim, usual.mag_ratios)
    except ValueError as error:
        logger.warning("no step cache: %s", error)
        return None


def _tea_cache(threshold: float | None, model_id: str, dit_dim: int) -> CacheOptions:
    model_id = model_id or tea_cache_model_id(dit_dim)
    if threshold is None and model_id in TEA_CACHE_MODELS:
        threshold = TEA_CACHE_MODELS[model_id].thresholds[0]
    return CacheOptions(name="teacache", threshold=threshold, model_id=model_id)


def _mag_cache(
    threshold: float | None, declared: Mapping[str, Sequence[float]] | None, dit_dim: int
) -> CacheOptions:
    published = MAG_CACHE_MODELS.get(_MAG_MODEL_OF_DIT_DIM.get(dit_dim, ""))
    if published is None and declared is None:
        raise ValueError(
            f"No MagCache ratios are known for a DiT of width {dit_dim}: measure them with "
            "calibrate_magcache and declare them in the checkpoint's config.json, or pass CacheOptions"
        )
    numbers = published or MAG_CACHE_MODELS["Wan2.1-T2V-1.3B"]
    return CacheOptions(
        name="magcache",
        threshold=numbers.threshold if threshold is None else threshold,
        ratios=numbers.ratios if declared is None else MagRatios.from_json(declared),
        max_skip=numbers.max_skip,
    )
