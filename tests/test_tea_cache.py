"""TeaCache: published decisions, and the rules that they follow."""

import pytest
import torch

from diffsynth.caches.tea_cache import TEA_CACHE_MODELS, TeaCache, tea_cache_model_id


@pytest.mark.parametrize("threshold", [0.05, 0.2])
@pytest.mark.parametrize("model_id", sorted(TEA_CACHE_MODELS))
def test_decisions_are_the_published_ones(golden, model_id, threshold):
    tensors, info = golden("teacache")
    cache = TeaCache(info["steps"], threshold, model_id)
    computed, accumulated, changes = [], [], []
    for e0 in tensors["t_mod"]:
        computed.append(cache.should_compute(e0))
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
    decisions = [(one.should_compute(e0), two.should_compute(e0.repeat(2, 1, 1))) for e0 in tensors["t_mod"]]
    assert all(a == b for a, b in decisions)
    assert {a for a, _ in decisions} == {True, False}


def test_the_first_and_the_last_step_compute_however_high_the_threshold(golden):
    tensors, _ = golden("teacache")
    cache = TeaCache(5, 1e9, "Wan2.1-T2V-1.3B")
    assert [cache.should_compute(e0) for e0 in tensors["t_mod"][:5]] == [True, False, False, False, True]


def test_a_change_that_is_not_a_number_computes():
    cache = TeaCache(4, 0.1, "Wan2.1-T2V-1.3B")
    assert [cache.should_compute(torch.zeros(1, 6, 4)) for _ in range(4)] == [True] * 4


def test_a_threshold_of_0_never_skips_though_estimates_fall_below_it():
    # Estimates of small changes are negative: -0.0499 at no change at all.
    cache = TeaCache(6, 0, "Wan2.1-T2V-1.3B")
    assert [cache.should_compute(torch.ones(1, 6, 4)) for _ in range(6)] == [True] * 6
    skipping = TeaCache(6, 1e-9, "Wan2.1-T2V-1.3B")
    assert not all(skipping.should_compute(torch.ones(1, 6, 4)) for _ in range(6))


def test_the_last_stored_residual_is_handed_out():
    cache = TeaCache(4, 0.1, "Wan2.1-T2V-1.3B")
    with pytest.raises(RuntimeError, match="No residual is stored"):
        _ = cache.residual
    cache.store(torch.zeros(2))
    cache.store(torch.ones(2))
    assert torch.equal(cache.residual, torch.ones(2))


def test_more_calls_than_steps_are_refused():
    cache = TeaCache(1, 0.1, "Wan2.1-T2V-1.3B")
    assert cache.should_compute(torch.ones(1, 6, 4))
    with pytest.raises(RuntimeError, match="made for 1 steps"):
        cache.should_compute(torch.ones(1, 6, 4))


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_threshold_that_is_no_number_of_at_least_0_is_refused(threshold):
    with pytest.raises(ValueError, match=r"The TeaCache threshold is .*; it must be a finite number, 0"):
        TeaCache(4, threshold, "Wan2.1-T2V-1.3B")


def test_bad_step_counts_and_unknown_models_are_named():
    with pytest.raises(ValueError, match="num_steps is 0"):
        TeaCache(0, 0.1, "Wan2.1-T2V-1.3B")
    with pytest.raises(ValueError, match=r"tea_cache_model_id is ''; it must be one of: Wan2.1-T2V-1.3B, "):
        TeaCache(4, 0.1, "")


def test_the_model_id_is_inferred_from_the_width_of_published_models():
    assert tea_cache_model_id(1536) == "Wan2.1-T2V-1.3B"
    assert tea_cache_model_id(5120) == "Wan2.1-T2V-14B"
    assert {tea_cache_model_id(dim) for dim in (1536, 5120)} <= set(TEA_CACHE_MODELS)
    with pytest.raises(ValueError, match="width 128; pass tea_cache_model_id"):
        tea_cache_model_id(128)
