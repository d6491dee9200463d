"""Draw cost against path error from rows that `benchmarks.quality` wrote, of several runs in one picture.

python -m docs.make_pareto docs/quality_cost.png results/quality/rows.jsonl results/eight_steps/rows.jsonl
"""

import argparse
from pathlib import Path

from benchmarks.quality.pairs import read_rows
from benchmarks.quality.report import cost_figure, summarise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, help="take the first pairs alone")
    parser.add_argument("--without", default="", help="methods to leave out, with commas between them")
    args = parser.parse_args()
    left_out = {name.strip() for name in args.without.split(",")}
    rows = [
        row
        for path in args.rows
        for row in read_rows(path)
        if row.method not in left_out and (args.pairs is None or row.pair < args.pairs)
    ]
    figure = cost_figure(summarise(rows))
    if figure is None:
        parser.error("no row has both a path error and a count of forwards")
    figure.savefig(args.picture)


if __name__ == "__main__":
    main()
