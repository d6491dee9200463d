"""Draw cost against path error from tables of docs/quality.md, those that have both columns and intervals.

python -m docs.make_pareto docs/quality_cost.png
"""

import re
import sys
from pathlib import Path

from benchmarks.quality.scatter import pareto_figure
from benchmarks.quality.statistics import Interval

COLUMNS = "path error px", "FFE"
LEFT_OUT = {"AMF"}  # which is effi_AMF at this size
LABELS = "denoising with its guidance, in full forwards of the DiT", "path error, px"


def points_of(text: str) -> dict[str, tuple[float, Interval]]:
    """Return (FFE, path error) of each row by its first cell."""
    points, head = {}, list[str]()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not set(COLUMNS) <= set(head):
            head = cells
        elif len(cells) != len(head):
            head = []
        else:
            error, cost = (cells[head.index(column)] for column in COLUMNS)
            if interval := re.fullmatch(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", error):
                value, low, high = map(float, interval.groups())
                name = cells[0].replace(" in each of", ",")
                name = f"8 steps: {name}" if head[0].startswith("8 steps") else name
                if cost and name not in LEFT_OUT:
                    points[name] = float(cost), Interval(value=value, low=low, high=high)
    return points


def main() -> None:
    text = (Path(__file__).parent / "quality.md").read_text()
    pareto_figure(points_of(text), *LABELS).savefig(sys.argv[1])


if __name__ == "__main__":
    main()
