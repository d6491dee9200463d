"""Draw cost against path error from tables of docs/quality.md.

python -m docs.make_pareto docs/quality_cost.png     those with both columns and intervals
python -m docs.make_pareto docs/quality_levers.png   reuse of gradients and guided steps, as shares of a base
"""

import re
import sys
from pathlib import Path

from benchmarks.quality.scatter import pareto_figure
from benchmarks.quality.statistics import Interval

COLUMNS = "path error px", "FFE"
LEFT_OUT = {"AMF"}  # which is effi_AMF at this size
LABELS = "denoising with its guidance, in full forwards of the DiT", "path error, px"

SHARE = r"([\d.]+)(?: \[([\d.]+), ([\d.]+)\])?"
BASES = 5.32, 3.97  # px of "interval 1", and of 4 fresh gradients


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


def lever_points(text: str) -> dict[str, tuple[float, Interval]]:
    """Return (FFE, path error) of reuse and guided steps, whose tables have shares of the errors BASES."""
    part = text[text.index("**Reuse of gradients.**") : text.index("(quality_levers.png)")]
    points = {}
    for table, base in zip(part.split("**Windows"), BASES, strict=True):
        for cells in (line.split("|")[1:-1] for line in table.splitlines()):
            share = re.fullmatch(SHARE, cells[-4].strip()) if cells else None
            if share and not re.search("window|extrapolated|4 fresh", cells[0]):  # at the place of others
                value, low, high = (base * float(part or "nan") for part in share.groups())
                name = cells[0].strip().split(":")[0].replace("falling steps on reused gradients", "falling")
                points[name] = float(cells[-2]), Interval(value=value, low=low, high=high)
    return points


def main() -> None:
    text = (Path(__file__).parent / "quality.md").read_text()
    points = lever_points(text) if "levers" in sys.argv[1] else points_of(text)
    pareto_figure(points, *LABELS).savefig(sys.argv[1])


if __name__ == "__main__":
    main()
