"""The rules of a run, made from the options of its step cache."""

from diffsynth.caches.rules import StepCache
from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.fields import load
from diffsynth.configs.options import CacheMaker


def make_rule(cache: CacheOptions | CacheMaker, prompt: str, steps: range, num_steps: int) -> StepCache:
    """Return a new rule for one prompt.

    Args:
        cache: options, or an object that makes rules of its own kind.
        prompt: "positive" or "negative".
        steps: those of the run's steps in which the prompt runs.
        num_steps: steps of the run.

    Raises:
        TypeError: the object makes rules that cannot tell their state, so that a run could not continue.
    """
    if isinstance(cache, CacheOptions):
        return load(CACHES[cache.name].rule).from_options(cache, prompt, steps, num_steps)
    rule = cache.make(prompt, steps, num_steps)
    if not hasattr(rule, "state") or not hasattr(rule, "restore"):
        raise TypeError(f"a rule of cache needs state() and restore(state); {type(rule).__name__} lacks them")
    return rule
