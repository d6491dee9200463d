"""Every option of the call, tried with values drawn from its own bounds and with values of every other sort.

A call with one value changed either gets to its first stage or is refused by a ValueError or TypeError that
names the option. A new option is tried without anyone adding it here.
"""

import math
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis, of the extra dev")

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.caches import CACHES, CacheOptions
from diffsynth.configs.fields import Choice, Levels, Number, OrNone, Several, Switch, Text, Whole, options_of
from diffsynth.configs.guidance import HEAD_READINGS, HeadsKind, MotionGuidance
from diffsynth.configs.kinds import ALIGNMENTS, AlignmentKind, CacheKind, MotionChanges, MotionKind
from diffsynth.configs.options import SavingOptions, call_options
from diffsynth.testing import write_clip

CASES = 600
SMALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3}
# Options whose value another one bounds: the message may name that one instead.
PARTNERS = {
    "tile_size": ("tile_stride",), "tile_stride": ("tile_size",), "sf": ("num_frames",),
    "tea_cache_model_id": ("cache",), "tea_cache_l1_thresh": ("TeaCache", "tea_cache_model_id"),
    "cache": ("MagCache", "tea_cache_model_id"), "mode": ("input_video", "variant"),
    "variant": ("released", "block"), "attention_window": ("mode",), "coarse": ("released",),
    "tile": ("released",), "window": ("released",), "vram_budget_gb": ("vram_gb",),
}  # fmt: skip
ODD = [
    "", "no", "x" * 2000, b"x", [], {}, (), {1, 2}, object(), True, -1, 0, 10**30, -(10**30), 1.5, 1e-30,
    1e30, math.nan, math.inf, -math.inf, np.float32(0.5), np.float64("nan"), np.int64(4), np.array([1, 2]),
    [1], (1,), [1, 2], (1, 2), (2, 1), ("a", "b"), [None, None], [1, 2, 3], (0.2, 0.7),
    (i for i in (1, 2)), range(2), print,
]  # fmt: skip


def values_of(kind):
    """Return a strategy of values that a kind allows."""
    if isinstance(kind, OrNone):
        return values_of(kind.kind)
    if isinstance(kind, Several):
        return st.tuples(*[values_of(kind.kind)] * len(kind.names))
    if isinstance(kind, Whole):
        most = kind.least + 3000 if kind.most is None else kind.most
        whole = st.integers(kind.least, most)
        return whole.filter(lambda n: n % 2 == 1) if kind.odd else whole
    if isinstance(kind, Number):
        least = kind.least if kind.above is None else kind.above
        return st.floats(
            least, kind.most, exclude_min=kind.above is not None, allow_nan=False, allow_infinity=False
        )
    if isinstance(kind, Choice):
        return st.sampled_from(sorted(kind.known))
    if isinstance(kind, HeadsKind):
        return st.sampled_from([*HEAD_READINGS, (0,), (0, 1), (99,)])
    if isinstance(kind, CacheKind):
        return st.sampled_from([*CACHES, CacheOptions(name="first_block", threshold=0.1)])
    if isinstance(kind, MotionKind):
        return st.sampled_from([MotionGuidance(block=0, guided_steps=1), {"sf": 3}, {}])
    if isinstance(kind, MotionChanges):
        return st.sampled_from([{}, {"lr": (0.002, 0.001)}, {"amf_weight": 3.0, "tau": 2.0}])
    if isinstance(kind, Levels):
        falling = st.lists(st.floats(0.01, 1), min_size=1, max_size=8, unique=True)
        return falling.map(lambda levels: tuple(sorted(levels, reverse=True)))
    if isinstance(kind, AlignmentKind):
        pixels = st.floats(-16384, 16384)
        return st.one_of(st.sampled_from(ALIGNMENTS), st.tuples(pixels, pixels, st.floats(0.1, 10)))
    return {Switch: st.booleans(), Text: st.text(max_size=kind.longest) if isinstance(kind, Text) else None}[
        type(kind)
    ]


OPTIONS = {name: option.kind for name, (option, _) in {**call_options(), **options_of(SavingOptions)}.items()}
NUMBERS = {name: option.kind for name, (option, _) in options_of(MotionGuidance).items()}
WITHIN = [st.tuples(st.just((group, name)), values_of(kind)) for group, kinds in
          (("call", OPTIONS), ("motion", NUMBERS)) for name, kind in kinds.items()]  # fmt: skip
NAMES = [("call", name) for name in OPTIONS] + [("motion", name) for name in NUMBERS]


class FirstStageError(Exception):
    """Raised where the first stage begins."""


def reach(_event):
    raise FirstStageError


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    from diffsynth.testing import write_checkpoint

    folder = tmp_path_factory.mktemp("arguments")
    pipe = WanVideoPipeline.from_pretrained(write_checkpoint(folder / "tiny"), device="cpu")
    clip = list(VideoData(write_clip(folder / "ref.mp4", num_frames=5, height=32, width=32)))

    def end_of(where, value):
        """Try a call with one value changed; return how it ended."""
        group, name = where
        changed = {name: value} if group == "call" else {"motion": {name: value}}
        if name in options_of(SavingOptions):
            changed["checkpoint_dir"] = folder / "state"
        try:
            pipe("a cat", input_video=clip, observer=reach, progress_bar_cmd=None, **{**SMALL, **changed})
        except FirstStageError:
            return "reached"
        except (ValueError, TypeError) as error:
            told = str(error)
            assert any(word in told for word in (name, *PARTNERS.get(name, ()))), (
                f"{where}={value!r:.80}: {told}"
            )
            return "refused"
        raise AssertionError(f"{where}={value!r}: no stage was reported")

    return end_of


@pytest.mark.slow
def test_values_within_the_bounds_reach_the_first_stage_or_are_refused_by_name(call):
    ends = Counter()

    @seed(0)
    @settings(max_examples=CASES, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.one_of(WITHIN))
    def every(case):
        ends[call(*case)] += 1

    every()
    assert sum(ends.values()) >= 0.9 * CASES
    assert ends["reached"] > ends["refused"], ends


@pytest.mark.parametrize("where", NAMES, ids="-".join)
def test_values_of_every_other_sort_are_refused_by_name(call, where):
    ends = Counter(call(where, value) for value in ODD)
    assert ends["refused"] >= len(ODD) / 3, ends
