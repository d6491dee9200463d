"""benchmarks/first_card.py, all of it at toy sizes: what a card is asked for must run before there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "first_card.py"
sys.path.insert(0, str(SCRIPT.parent))
import first_card  # noqa: E402


def run(out, *options):
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
def test_every_part_runs_on_a_cpu_and_says_what_it_measured(tmp_path, half):
    out, parts = tmp_path / "card.jsonl", list(first_card.PARTS)[half::2]
    told = run(out, "--only", *parts)
    rows = first_card.read(out)
    assert {row["part"]: row["ended"] for row in rows if "ended" in row} == dict.fromkeys(parts, "done"), rows
    figures = {part: [row for row in rows if row["part"] == part and "where" not in row] for part in parts}
    assert all(len(found) > 1 for found in figures.values()), figures
    assert all(f"### {part.replace('_', ' ')}: done" in told for part in parts)
    numbers = [
        value for row in rows for key, value in row.items() if key.endswith(("_s", "seconds", "TFLOPs"))
    ]
    assert numbers
    assert all(value >= 0 for value in numbers)


def test_it_continues_where_it_stopped_and_writes_at_once(tmp_path, monkeypatch):
    out, started = tmp_path / "card.jsonl", []
    first_card.append(out, {"part": "attention", "kernel": "sdpa", "forward_ms": 2.0})
    first_card.append(out, {"part": "attention", "ended": "done", "seconds": 3.0})
    first_card.append(out, {"part": "peaks", "model": "1.3b", "planned_GB": 7.25})
    out.write_text(out.read_text() + '{"part": "peaks", "mod')  # killed while it wrote
    monkeypatch.setattr(first_card, "run_part", lambda name, _: started.append(name))
    monkeypatch.setattr(sys, "argv", ["first_card.py", "--out", str(out), "--only", "attention", "peaks"])
    first_card.main()
    assert started == ["peaks"]
    report = first_card.report(first_card.read(out))
    assert "### attention: done in 3.0 s" in report
    assert "| model | planned_GB |\n| --- | --- |\n| 1.3b | 7.25 |" in report
    assert "### presets: not run" in report


def test_a_part_that_takes_too_long_costs_its_own_rest_alone(tmp_path, monkeypatch):
    out = tmp_path / "card.jsonl"
    monkeypatch.setitem(first_card.PARTS, "nano_training", 0.05)
    monkeypatch.setattr(
        sys,
        "argv",
        ["first_card.py", "--device", "cpu", "--tiny", "--out", str(out), "--only", "nano_training"],
    )
    first_card.main()
    assert json.loads(out.read_text().splitlines()[-1])["ended"] == "time ran out"
