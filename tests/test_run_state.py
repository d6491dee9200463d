"""State files, and the objects whose state they hold: everything comes back, what is damaged is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.mag_calibration import _Series
from diffsynth.caches.rules import Probe, make_rule
from diffsynth.configs.cache_tables import MagRatios
from diffsynth.configs.caches import CacheOptions
from diffsynth.motion import GradientMemory, MotionGuidance
from diffsynth.runs import state as run_state
from diffsynth.runs.identity import identity_differences
from diffsynth.runs.state import load_state, save_state
from diffsynth.schedulers import make_scheduler

STEPS = 4
CACHES = {
    "teacache": CacheOptions(name="teacache", threshold=1e9, model_id="Wan2.1-T2V-1.3B"),
    "magcache": CacheOptions(
        name="magcache", threshold=0.5, ratios=MagRatios((1.0, 0.99, 0.98, 0.97)), retention=0
    ),
    "first_block": CacheOptions(name="first_block", threshold=9.0),
}


def everything(thing):
    """All that an object holds, down to tensors and numbers, as pairs that can be compared."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, tuple(thing.shape), thing.tolist()
    if isinstance(thing, dict):
        return {name: everything(value) for name, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [everything(value) for value in thing]
    names = [*getattr(thing, "__slots__", ()), *getattr(thing, "__dict__", ())]
    return {name: everything(getattr(thing, name)) for name in names} if names else thing


def cache_rule(name):
    def make():
        return make_rule(CACHES[name], "positive", range(STEPS), STEPS)

    def step(rule, x):
        if rule.decide(Probe(x[None, :6], x[None])):
            rule.store(x + 1)

    return make, step


def unipc():
    def make():
        scheduler = make_scheduler("unipc", 3.0)
        scheduler.set_timesteps(STEPS)
        return scheduler

    return make, lambda scheduler, x: scheduler.step(x, scheduler.timesteps[scheduler._next], 2 * x)


def memory():
    def step(kept, x):
        if kept.begin() is None:
            kept.keep(0, x)
            kept.keep(2, x + 1)

    return lambda: GradientMemory(MotionGuidance(recompute_every=2, recompute_below=0.0)), step


@pytest.mark.parametrize("kind", ["teacache", "magcache", "first_block", "unipc", "memory", "calibration"])
@pytest.mark.parametrize("steps", range(STEPS + 1))
def test_everything_that_an_object_holds_comes_back(tmp_path, kind, steps):
    other = {"unipc": unipc, "memory": memory, "calibration": lambda: (_Series, lambda s, x: s.store(x))}
    make, step = other.get(kind, lambda: cache_rule(kind))()
    whole, generator = make(), torch.Generator().manual_seed(3)
    for _ in range(steps):
        step(whole, torch.randn(6, 8, generator=generator))
    save_state(tmp_path / "a", whole.state(), {})
    again = make()
    again.restore(load_state(tmp_path / "a")[0])
    assert everything(again) == everything(whole)


def test_a_state_of_another_scheduler_is_refused():
    schedulers = {name: make_scheduler(name) for name in ("euler", "unipc")}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="this scheduler keeps nothing; got a state of next"):
        schedulers["euler"].restore(schedulers["unipc"].state())
    with pytest.raises(ValueError, match="the state is of step None; this run has 3 steps"):
        schedulers["unipc"].restore(schedulers["euler"].state())


def test_long_values_are_told_apart_by_their_hash():
    saved, current = ({"prompt": text} for text in ("x", "y"))
    assert identity_differences(saved, current) == ["prompt (saved: x, now: y)"]
    assert identity_differences({**saved, "a": "1"}, saved) == ["a (saved: 1, now: nothing)"]


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no state file"):
        load_state(tmp_path / "nothing")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other is damaged or no state file: its checksum"):
        load_state(tmp_path / "other")
    tensors, text = {"a": torch.tensor([1.0, float("nan")])}, json.dumps({"format": 1})
    good = {"fastvmt": text, "crc32": run_state._checksum(text, tensors)}
    save_file(tensors, tmp_path / "nan", good)
    with pytest.raises(ValueError, match="nan: a holds values that are not finite"):
        load_state(tmp_path / "nan")
    text = json.dumps({"format": 9})
    save_file({}, tmp_path / "new", {"fastvmt": text, "crc32": run_state._checksum(text, {})})
    with pytest.raises(ValueError, match="new is of format 9; this version reads format 1"):
        load_state(tmp_path / "new")


def test_a_state_comes_back_as_it_was_also_where_tensors_share_memory(tmp_path):
    x = torch.randn(3, 4)
    state = {
        "x": x, "same": x, "view": x[1:, ::2], "wide": x[:1].expand(5, 4), "half": x.bfloat16(),
        "scalar": torch.tensor(2.5), "steps": [1, 2], "none": None, "number": 0.1 + 0.2, "nan": float("inf"),
    }  # fmt: skip
    save_state(tmp_path / "a", state, {"who": "me"})
    loaded, facts = load_state(tmp_path / "a")
    assert facts == {"who": "me"}
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(loaded[name], value)
            assert loaded[name].dtype == value.dtype
        else:
            assert loaded[name] == value


def test_a_rule_that_cannot_tell_its_state_is_refused():
    class Maker:
        def make(self, *_):
            return object()

    with pytest.raises(TypeError, match=r"must return rules with state\(\), restore\(\); got object"):
        make_rule(Maker(), "positive", range(2), 2)
