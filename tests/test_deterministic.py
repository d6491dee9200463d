"""`deterministic=True`: what it switches on, where it is recorded. That bits repeat only a card can show."""

import sys
from types import SimpleNamespace

import pytest
import torch

from diffsynth.configs.options import RunOptions
from diffsynth.models.attention import BACKENDS
from diffsynth.vram_management import Residency


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("device", "wanted", "strict"), [("cuda", True, True), ("cuda", False, False), ("cpu", True, False)]
)
def test_a_run_on_a_cuda_device_may_use_no_kernel_that_rounds_differently_each_time(device, wanted, strict):
    with Residency({}, torch.device(device)).exclusive(deterministic=wanted):
        assert torch.are_deterministic_algorithms_enabled() == strict
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_callers_own_choice_is_put_back_after_an_error():
    torch.use_deterministic_algorithms(True)
    with pytest.raises(ZeroDivisionError), Residency({}, torch.device("cuda")).exclusive(deterministic=True):
        1 / 0  # noqa: B018
    assert torch.are_deterministic_algorithms_enabled()


def test_flash_attention_is_asked_for_its_deterministic_backward(monkeypatch):
    asked = []

    def kernel(q, _k, _v, **options):
        asked.append(options)
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=kernel))
    q = torch.zeros(1, 4, 1, 8)
    BACKENDS["flash_attn_2"].run(q, q, q)
    torch.use_deterministic_algorithms(True)
    BACKENDS["flash_attn_2"].run(q, q, q)
    assert asked == [{}, {"deterministic": True}]


def test_the_record_of_a_run_says_which_it_was():
    assert RunOptions().to_json()["deterministic"] is False
    stored = RunOptions(deterministic=True).to_json()
    assert RunOptions.from_json(stored).deterministic
    del stored["deterministic"]  # a record of an earlier version
    assert not RunOptions.from_json(stored).deterministic
