"""System calls that fail, and kills at them: a few of those that benchmarks/reliability/faults.py tries."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "reliability" / "faults.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
@pytest.mark.parametrize(
    "words", [("--only", "transfer"), ("--only", "save_"), ("--only", "resume", "--kill")], ids=" ".join
)
def test_nothing_is_lost_or_left_whichever_system_call_fails(tmp_path, words):
    table = tmp_path / "table.json"
    stride = "2" if "save_" in words else "9"
    command = [sys.executable, SCRIPT, "--stride", stride, "--json", table, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(row["held"] == row["faults"] > 2 for row in json.loads(table.read_text()))
