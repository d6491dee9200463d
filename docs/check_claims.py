"""Run the commands of docs/claims.md that take less than a minute, and compare what they print.

python docs/check_claims.py [WORD]        only rows that contain WORD
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from diffsynth.cli.main import main as fastvmt

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "claims.md"
NEAR = 0.15  # of a number that is written ~5.7


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of the page."""

    document: str
    words: str
    command: str
    prints: str
    when: str


def read_claims() -> list[Claim]:
    """Return the rows of the page."""
    rows = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("|")]
    names = ("document", "words", "command", "prints", "when")
    claims = []
    for row in rows[2:]:
        cells = [cell.strip() for cell in row]
        cells[2:4] = [cell.strip("`") for cell in cells[2:4]]
        claims.append(Claim(**dict(zip(names, cells, strict=True))))
    return claims


def agrees(printed: str, expected: str) -> bool:
    """Return whether a text has the parts of `expected` in order; numbers written ~X within NEAR."""
    parts, numbers = [], []
    for part in expected.split("..."):
        pieces = re.split(r"(~[\d.]+)", part.strip())
        numbers += [float(piece[1:]) for piece in pieces if piece.startswith("~")]
        parts.append("".join(r"([\d.]+)" if p.startswith("~") else re.escape(p) for p in pieces))
    found = re.search(".*?".join(parts), printed, re.DOTALL)
    if found is None:
        return False
    values = [float(value) for value in found.groups()]
    return all(abs(value - number) <= NEAR * number for value, number in zip(values, numbers, strict=True))


def run(command: str) -> str:
    """Return what a command prints; if it fails, its errors. `fastvmt` runs in this process."""
    program, *arguments = shlex.split(command)
    if program == "fastvmt":
        out, problems = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(problems):
            code = fastvmt(arguments)
        return out.getvalue() if code == 0 else problems.getvalue()
    ran = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    return ran.stdout if ran.returncode == 0 else ran.stderr


def main() -> int:
    """Run the rows marked ci in one folder; return 1 if one does not print what it should."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    claims = [claim for claim in read_claims() if claim.when == "ci" and word in repr(claim)]
    printed: dict[str, str] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in ("examples", "models", "benchmarks", "docs"):
            Path(folder, name).symlink_to(ROOT / name)
        os.chdir(folder)
        for claim in claims:
            begun = time.perf_counter()
            if claim.command not in printed:
                printed[claim.command] = run(claim.command)
            right = agrees(printed[claim.command], claim.prints)
            failed += not right
            print(
                f"{'ok  ' if right else 'FAIL'} {time.perf_counter() - begun:5.1f} s  {claim.command}",
                flush=True,
            )
            if not right:
                print(f"  {claim.document}: {claim.words}\n  expected: {claim.prints}")
                print(f"  printed:  {printed[claim.command][-2000:]}")
        os.chdir(ROOT)
    print(f"{len(claims) - failed} of {len(claims)} claims hold")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
