"""The jobs of a batch: read from JSON lines or CSV, checked before anything runs."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffsynth.cli.arguments import NOT_OFFERED
from diffsynth.configs.fields import Kind, Text, check_value, options_of
from diffsynth.configs.guidance import MotionGuidance
from diffsynth.configs.options import MOTION_PREFIX, PICTURES, FileOptions, ReferenceOptions, call_options
from diffsynth.configs.resolve import LONGEST_PROMPT
from diffsynth.jobs.errors import UsageError
from diffsynth.jobs.task import PROMPTS

SHORT = {option.short: name for name, (option, _) in call_options().items() if option.short}
_STATED = {**call_options(), **options_of(FileOptions), **options_of(ReferenceOptions)}
# The kind of value of each option that a job may have, by all its names.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(PROMPTS, Text(LONGEST_PROMPT)),
    **{name: option.kind for name, (option, _) in _STATED.items() if name not in NOT_OFFERED},
    **{short: _STATED[name][0].kind for short, name in SHORT.items()},
    **{MOTION_PREFIX + name: option.kind for name, (option, _) in options_of(MotionGuidance).items()},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JobLine:
    """One video of a batch."""

    line: int  # its number in the file, from 1
    options: Mapping[str, Any]  # arguments of the call, prompts and file options
    reference: Path | None  # None: the prompt alone decides
    pictures: Mapping[str, Path]  # by argument, input_image or end_image
    output: Path | None  # None: a name is made


def read_jobs(
    path: Path, output_dir: Path, shared: Mapping[str, Any], pictures: Mapping[str, Path] | None = None
) -> list[JobLine]:
    """Read the jobs of a .jsonl or .csv file; `shared` and `pictures` are for jobs that do not set their own.

    Raises:
        FileNotFoundError: there is no such file.
        UsageError: the file cannot be read, or a job has an unknown option, an option that is not allowed, an
            output outside of output_dir, or the output of another job; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"jobs file {path} does not exist")
    read = {".jsonl": _json_lines, ".csv": _csv_lines}.get(path.suffix.lower())
    if read is None:
        raise UsageError(f"jobs file {path} must end in .jsonl or .csv")
    jobs = [_job(path, line, values, output_dir, shared, pictures or {}) for line, values in read(path)]
    if not jobs:
        raise UsageError(f"jobs file {path} holds no jobs")
    counts = Counter(str(job.output) for job in jobs if job.output)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"jobs file {path}: more than one job has the output {', '.join(twice)}")
    return jobs


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path}, line {number}: a job must be an object; got {line.strip():.60}")
        yield number, values


def _csv_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                raise UsageError(f"{path}, line {rows.line_num}: row and header differ in number of cells")
            # An empty cell leaves the option unset.
            yield rows.line_num, {name: text for name, text in row.items() if text}
    except csv.Error as error:
        raise UsageError(f"{path}, line {rows.line_num}: {error}") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"jobs file {path} is not UTF-8 text ({error})") from error


def _job(
    file: Path,
    line: int,
    values: Mapping[str, Any],
    output_dir: Path,
    shared: Mapping[str, Any],
    pictures: Mapping[str, Path],
) -> JobLine:
    where = f"{file}, line {line}"
    entries = {name.strip().replace("-", "_"): value for name, value in values.items()}
    shown = {name: picture for picture, (name, _) in PICTURES.items()}
    paths = {name: entries.pop(name, None) for name in ("reference", "output", *shown)}
    for name, value in paths.items():
        if value is not None and not isinstance(value, str):
            raise UsageError(f"{where}: {name} must be text; got {value!r}")
    motion = entries.pop("motion", {})
    if not isinstance(motion, dict):
        raise UsageError(f'{where}: motion must be an object such as {{"guided_steps": 6}}; got {motion!r}')
    entries |= {MOTION_PREFIX + name: value for name, value in motion.items()}
    if unknown := sorted(entries.keys() - _KINDS.keys()):
        raise UsageError(f"{where}: unknown option {', '.join(unknown)}")
    options = dict(shared)
    for name, value in entries.items():
        if value is None and not name.startswith(MOTION_PREFIX):  # null in JSON leaves it unset
            continue
        as_text = isinstance(value, str)
        try:
            options[SHORT.get(name, name)] = check_value(name, _KINDS[name], value, as_text=as_text)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
    reference = None if paths["reference"] is None else file.parent / paths["reference"]
    output = None if paths["output"] is None else output_dir / paths["output"]
    if output is not None and output_dir.resolve() not in output.resolve().parents:
        raise UsageError(f"{where}: output {paths['output']!r} is outside of the output folder {output_dir}")
    own = {shown[name]: file.parent / path for name in shown if (path := paths[name]) is not None}
    pictures = {**pictures, **own}
    return JobLine(line=line, options=options, reference=reference, pictures=pictures, output=output)
