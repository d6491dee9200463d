"""Measure on a card what was only predicted, in order of worth, in 45 minutes on an H100.

    python benchmarks/first_card.py                          # the accelerator, at published sizes
    python benchmarks/first_card.py --device cpu --tiny      # all of it at toy sizes, to see that it runs
    python benchmarks/first_card.py --report                 # the tables of what was measured so far

Each part runs in a process of its own with a time limit, and appends what it measures to first_card.jsonl as
soon as it is measured: a crash or a limit costs one part its rest. A second call continues with the parts
that have not ended on this device; --again NAME repeats one. The file is what to send.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Part -> its limit in seconds, in order of worth; what each does: `PARTS` of card_parts.py.
PARTS = {
    "self_test": 300,
    "gpu_tests": 600,
    "attention": 120,
    "dit_forward": 180,
    "peaks": 420,
    "out_of_memory": 180,
    "streaming": 180,
    "presets": 600,
    "vae": 240,
    "compile": 300,
    "nano_training": 60,
}
ENDED = ("done", "failed", "time ran out")
HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a CPU")
    parser.add_argument("--out", type=Path, default=Path("first_card.jsonl"))
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument(
        "--again", nargs="+", choices=PARTS, default=[], metavar="PART", help="though it has ended"
    )
    parser.add_argument("--report", action="store_true", help="print the tables and measure nothing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        import card_parts

        card_parts.run(args.part, args.device, args.tiny, args.out)
        return
    if not args.report:
        for name in args.only or PARTS:
            ended = [row for row in read(args.out) if row["part"] == name and row.get("ended") in ENDED]
            if name in args.again or not ended:
                run_part(name, args)
    print(report(read(args.out)))


def run_part(name: str, args: argparse.Namespace) -> None:
    """Run a part in a process of its own, and write down how it ended."""
    command = [
        sys.executable,
        __file__,
        "--part",
        name,
        "--device",
        args.device,
        "--out",
        str(args.out.absolute()),
    ]
    command += ["--tiny"] * args.tiny
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    print(f"{name} (at most {PARTS[name]} s) ...", flush=True)
    started, told = time.perf_counter(), ""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            timeout=PARTS[name], env={**os.environ, "PYTHONPATH": paths}, check=False,
        )  # fmt: skip
        ended, told = "failed" if done.returncode else "done", done.stdout
    except subprocess.TimeoutExpired as late:
        ended, told = "time ran out", (late.stdout or b"").decode(errors="replace")
    row = {"part": name, "ended": ended, "seconds": round(time.perf_counter() - started, 1)}
    append(args.out, row if ended == "done" else {**row, "told": told[-2000:]})
    print(f"{name}: {ended} after {row['seconds']} s")


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row to the file, so that it is there whatever comes next."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The rows so far; a last line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # noqa: PERF203
            continue
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown tables for docs/performance.md: one for each part and kind of row, in the file's order."""
    lines = []
    for name in PARTS:
        own = [row for row in rows if row["part"] == name]
        ended = [row for row in own if "ended" in row]
        state = f"{ended[-1]['ended']} in {ended[-1]['seconds']} s" if ended else "not run"
        lines += ["", f"### {name.replace('_', ' ')}: {state}"]
        tables: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for row in own:
            if "ended" not in row:
                tables.setdefault(tuple(key for key in row if key != "part"), []).append(row)
        for columns, found in tables.items():
            lines += ["", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
            lines += [f"| {' | '.join(cell(row[column]) for column in columns)} |" for row in found]
        if ended and ended[-1].get("told"):
            lines += ["", "```", ended[-1]["told"].strip()[-600:], "```"]
    return "\n".join(lines)


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    main()
