"""Measured quality of motion transfer: every method on synthetic pairs, with 95 % intervals over pairs.

    python -m benchmarks.quality --model_dir nano --pairs 32 --seeds 2 --split test --workers 2

Writes rows.jsonl, table.md, summary.json, sheet.png, pareto.png and videos/ to --output_dir. Call it again to
continue where it stopped. --methods takes names, with commas between them; --list shows them. --variants: a
JSON file of further methods, name -> {"motion": {fields of MotionGuidance}, arguments of the call}.
"""

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from benchmarks.quality.contact_sheet import contact_sheet, load_strip
from benchmarks.quality.methods import VIDEO_TO_VIDEO, Method, methods_from, standard_methods
from benchmarks.quality.pairs import (
    SPLITS,
    Job,
    Row,
    append_row,
    make_pairs,
    missing_jobs,
    read_rows,
    run_pair,
    strip_name,
)
from benchmarks.quality.report import as_json, best_method, cost_figure, markdown_table, summarise
from diffsynth import WanVideoPipeline
from diffsynth.configs.descriptors import NO_TRANSFER

_worker: dict[str, object] = {}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", default="nano")
    parser.add_argument("--lora", type=Path, help="file to merge into the DiT")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--split", choices=SPLITS, default="test")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--variants", type=Path, help="JSON file of methods to compare as well")
    parser.add_argument("--output_dir", type=Path, default=Path("results/quality"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sheet", type=int, default=8, help="pairs on the contact sheet")
    parser.add_argument("--sheet_method", default="effi_AMF")
    parser.add_argument("--list", action="store_true", help="name the methods and stop")
    return parser.parse_args()


def chosen_methods(known: list[Method], names: str) -> list[Method]:
    """Return the methods of some names, with commas between them. Raises SystemExit for an unknown name."""
    if names == "all":
        return known
    by_name = {method.name: method for method in known}
    wanted = [name.strip() for name in names.split(",")]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise SystemExit(f"--methods may be of {', '.join(by_name)}; got {', '.join(unknown)}")
    return [by_name[name] for name in wanted]


def load_pipeline(args: argparse.Namespace) -> WanVideoPipeline:
    loras = None if args.lora is None else {args.lora: 1.0}
    return WanVideoPipeline.from_pretrained(args.model_dir, device=args.device, loras=loras)


def start_worker(args: argparse.Namespace) -> None:
    """Load the model in a worker, which uses one thread, since more would compete for the cores."""
    torch.set_num_threads(1)
    _worker["pipe"] = load_pipeline(args)
    _worker["videos"] = args.output_dir / "videos"


def run_job(job: Job) -> Row:
    return run_pair(_worker["pipe"], job.pair, job.method, job.seed, _worker["videos"])


def run_jobs(jobs: list[Job], args: argparse.Namespace) -> Iterator[Row]:
    """Yield rows as they are done; one worker is this process itself, as an accelerator needs it."""
    if args.workers == 1:
        start_worker(args)
        yield from map(run_job, jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, spawn, start_worker, (args,)) as pool:
        for future in as_completed([pool.submit(run_job, job) for job in jobs]):
            yield future.result()


def report(rows: list[Row], output_dir: Path) -> str:
    """Write table.md, summary.json and pareto.png, and return the table over all pairs."""
    groups = {
        "All references": rows,
        "References of trained shapes and paths": [row for row in rows if not row.held_out],
        "References of held-out shapes and paths": [row for row in rows if row.held_out],
    }
    texts, summaries = [], {}
    for title, group in groups.items():
        if not group:
            continue
        summary = summarise(group)
        texts.append(f"## {title}\n\n{markdown_table(summary)}")
        summaries[title] = {NO_TRANSFER: as_json(summary)}
        best = best_method(summary, tuple(VIDEO_TO_VIDEO))
        if best is not None:
            against = summarise(group, best)
            table = markdown_table(against, best, ("trajectory_error",))
            texts[-1] += f"\nAgainst {best}, the best video-to-video:\n\n{table}"
            summaries[title][best] = as_json(against)
    (output_dir / "table.md").write_text("\n".join(texts))
    (output_dir / "summary.json").write_text(json.dumps(summaries, indent=1))
    if figure := cost_figure(summarise(rows)):
        figure.savefig(output_dir / "pareto.png")
    return texts[0]


def write_sheet(args: argparse.Namespace, pairs: list) -> None:
    """Write sheet.png of the first pairs: reference, no transfer, transferred.

    Pairs without both videos are left out.
    """
    videos, captions = [], []
    for pair in pairs[: args.sheet]:
        strips = [
            args.output_dir / "videos" / strip_name(pair, name, 0)
            for name in (NO_TRANSFER, args.sheet_method)
        ]
        if all(strip.is_file() for strip in strips):
            frames = pair.clip.frames
            videos.append([frames, *(load_strip(strip, len(frames)) for strip in strips)])
            captions.append(f"prompt: {pair.prompt}")
    if videos:
        titles = ("reference", NO_TRANSFER, args.sheet_method)
        contact_sheet(videos, captions, titles).save(args.output_dir / "sheet.png")


def main() -> None:
    args = parse_arguments()
    pipe = load_pipeline(args)
    declared = pipe.defaults.options
    height, width, num_frames = (
        declared.get(name, default) for name, default in (("height", 64), ("width", 64), ("num_frames", 17))
    )
    known = standard_methods(pipe, height, width)
    known += methods_from(args.variants, pipe) if args.variants else []
    if args.list:
        print("\n".join(method.name for method in known))
        return
    methods = chosen_methods(known, args.methods)
    pairs = make_pairs(args.pairs, args.split, num_frames=num_frames, height=height, width=width)
    rows_path = args.output_dir / "rows.jsonl"
    jobs = missing_jobs(pipe, pairs, methods, range(args.seeds), rows_path)
    del pipe
    for number, row in enumerate(run_jobs(jobs, args) if jobs else (), 1):
        append_row(row, rows_path)
        error = row.error or f"path error {row.trajectory_error:.2f} px, {row.seconds:.1f} s"
        print(f"{number}/{len(jobs)} pair {row.pair}, {row.method}, seed {row.seed}: {error}", flush=True)
    wanted = {method.name for method in methods}
    indices = {pair.index for pair in pairs}
    rows = [
        row
        for row in read_rows(rows_path)
        if row.method in wanted and row.split == args.split and row.pair in indices and row.seed < args.seeds
    ]
    print(report(rows, args.output_dir))
    write_sheet(args, pairs)


if __name__ == "__main__":
    main()
