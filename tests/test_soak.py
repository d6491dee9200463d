"""Runs one after the other in a process leave nothing behind; benchmarks/soak.py does more of them."""

import sys
from pathlib import Path

import pytest

from diffsynth.testing import write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc, of Linux")


def test_memory_and_handles_stay_as_they_are(tmp_path):
    from soak import soak

    model = write_checkpoint(tmp_path / "tiny")
    seen = soak(model, 12, tmp_path, num_inference_steps=2, num_frames=9)
    assert len({handles for _memory, handles in seen[2:]}) == 1
    assert seen[-1][0] < 1.03 * seen[3][0]
