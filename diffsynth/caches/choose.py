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
    """
    if isinstance(cache, CacheOptions):
        return load(CACHES[cache.name].rule).from_options(cache, prompt, steps, num_steps)
    return cache.make(prompt, steps, num_steps)
