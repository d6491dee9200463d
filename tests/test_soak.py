"""Runs one after the other in a process leave nothing behind; benchmarks/reliability/soak.py does more."""

import sys
from multiprocessing import get_context
from pathlib import Path

import pytest

from diffsynth.testing import write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "reliability"))
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc, of Linux")


@pytest.mark.slow
def test_memory_and_handles_stay_as_they_are(tmp_path):
    from soak import soak

    model = write_checkpoint(tmp_path / "tiny")
    short = {"num_inference_steps": 2, "num_frames": 9}
    with get_context("spawn").Pool(1) as alone:  # other tests leave threads that allocate
        seen = alone.apply(soak, (model, 15, tmp_path), short)
    assert len({handles for _memory, handles in seen[2:]}) == 1
    # What is in use at the moment varies; the least of some runs is what stays.
    early, late = (min(memory for memory, _handles in part) for part in (seen[3:9], seen[9:]))
    assert late < 1.02 * early
