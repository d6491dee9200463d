"""Runs killed with signal 9 that go on; benchmarks/reliability/kill_and_resume.py tries more moments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reliability" / "kill_and_resume.py"
STAGES = ("guidance", "sampling", "save state", "decode", "write video")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_run_killed_anywhere_goes_on_to_the_same_frames_and_no_video_is_broken(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, SCRIPT, "--moments", "5", "--stages", *STAGES, "--json", table]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(table.read_text())
    assert [row["stage"] for row in content["rows"]] == list(STAGES)
    for row in content["rows"]:
        assert row["frames equal"], row
        assert row["old video"] in ("kept", "new, complete"), row
        assert row["steps done again"] == 0, row
    # Decoding and writing come after the last step, whose latents are kept by then.
    assert [row["steps kept"] for row in content["rows"][3:]] == [5, 5]
    assert all(content["moments"][stage] > 5 for stage in STAGES)
