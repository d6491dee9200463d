"""TeaCache: published decisions, and the rules that they follow."""

import pytest
import torch

from diffsynth.caches.rules import Probe
from diffsynth.caches.tea_cache import TeaCache
from diffsynth.configs.cache_tables import tea_cache_models
from diffsynth.configs.caches import CacheOptions, choose_cache


def seen(e0):
    return Probe(modulation=e0, residual=None)


@pytest.mark.parametrize("threshold", [0.05, 0.2])
@pytest.mark.parametrize("model_id", sorted(tea_cache_models()))
def test_decisions_are_the_published_ones(golden, model_id, threshold):
    tensors, info = golden("teacache")
    cache = TeaCache(info["steps"], threshold, model_id)
    computed, accumulated, changes = [], [], []
    for e0 in tensors["t_mod"]:
        computed.append(cache.decide(seen(e0)))
        accumulated.append(cache.accumulated)
        changes.append(cache.relative_change)
    name = f"{model_id}@{threshold}"
    assert [not c for c in computed] == tensors[f"{name}.skip"].bool().tolist()
    assert accumulated == pytest.approx(tensors[f"{name}.accumulated"].tolist(), rel=1e-5, abs=1e-12)
    assert changes[1:] == pytest.approx(tensors["relative_l1"].tolist(), abs=1e-6)


def test_a_guidance_batch_of_two_decides_as_one_branch_does(golden):
    tensors, info = golden("teacache")
    one = TeaCache(info["steps"], 0.2, "Wan2.1-T2V-14B")
    two = TeaCache(info["steps"], 0.2, "Wan2.1-T2V-14B")
    decisions = [(one.decide(seen(e0)), two.decide(seen(e0.repeat(2, 1, 1)))) for e0 in tensors["t_mod"]]
    assert all(a == b for a, b in decisions)
    assert {a for a, _ in decisions} == {True, False}


def test_the_first_and_the_last_step_compute_however_high_the_threshold(golden):
    tensors, _ = golden("teacache")
    cache = TeaCache(5, 1e9, "Wan2.1-T2V-1.3B")
    assert [cache.decide(seen(e0)) for e0 in tensors["t_mod"][:5]] == [True, False, False, False, True]


def test_a_change_that_is_not_a_number_computes():
    cache = TeaCache(4, 0.1, "Wan2.1-T2V-1.3B")
    assert [cache.decide(seen(torch.zeros(1, 6, 4))) for _ in range(4)] == [True] * 4


def test_a_threshold_of_0_never_skips_though_estimates_fall_below_it():
    # Estimates of small changes are negative: -0.0499 at no change at all.
    cache = TeaCache(6, 0, "Wan2.1-T2V-1.3B")
    assert [cache.decide(seen(torch.ones(1, 6, 4))) for _ in range(6)] == [True] * 6
    skipping = TeaCache(6, 1e-9, "Wan2.1-T2V-1.3B")
    assert not all(skipping.decide(seen(torch.ones(1, 6, 4))) for _ in range(6))


def test_the_last_stored_residual_is_handed_out():
    cache = TeaCache(4, 0.1, "Wan2.1-T2V-1.3B")
    with pytest.raises(RuntimeError, match="No residual is stored"):
        _ = cache.residual
    cache.store(torch.zeros(2))
    cache.store(torch.ones(2))
    assert torch.equal(cache.residual, torch.ones(2))


def test_more_calls_than_steps_are_refused():
    cache = TeaCache(1, 0.1, "Wan2.1-T2V-1.3B")
    assert cache.decide(seen(torch.ones(1, 6, 4)))
    with pytest.raises(RuntimeError, match="is for 1 steps"):
        cache.decide(seen(torch.ones(1, 6, 4)))


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_threshold_that_is_no_number_of_at_least_0_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a finite number at least 0; got"):
        CacheOptions(name="teacache", threshold=threshold, model_id="Wan2.1-T2V-1.3B")


def test_unknown_models_are_named():
    with pytest.raises(ValueError, match=r"tea_cache_model_id is 'Wan9'; it must be one of: Wan2\.1"):
        CacheOptions(name="teacache", threshold=0.1, model_id="Wan9")


def test_the_model_id_is_inferred_from_the_width_of_published_models():
    assert choose_cache("teacache", None, 1536).model_id == "Wan2.1-T2V-1.3B"
    assert choose_cache("teacache", None, 5120).model_id == "Wan2.1-T2V-14B"
    with pytest.raises(ValueError, match="width 128; pass tea_cache_model_id"):
        choose_cache("teacache", None, 128)
