"""Let every system call of a command fail, one after the other: is anything lost, half written or left lying?

python benchmarks/reliability/faults.py [--only transfer --stride 1 --modes 8 --kill --json table.json]

The n-th call below the working folder (open, write, fsync, rename, link, mkdir, spawn) fails with ENOSPC,
EIO, EACCES or EMFILE, that one alone or all from it on, for n = 1, 2, ... to the end. After each, outputs
must be the old ones, the new ones or absent; a result that was computed must still be there; no other file
may be left; and the same command without faults must end as if there had been none. With --kill the process
is killed there instead, by signal 9. A C compiler is needed.
"""

import argparse
import contextlib
import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILL = -1
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE)
MODES = [(number, lasting) for lasting in (False, True) for number in ERRORS]
SOURCE = Path(__file__).with_name("faults.c")
FRAMES = 5


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command whose calls fail.

    Attributes:
        name: for the table.
        prepare: puts into a new folder what the command finds there.
        command: called with the folder; returns an exit code, or raises what is documented.
        outputs: names of the files and folders that it makes.
        kept: patterns of other files that may stay, such as saved states and latents.
        computed: the result of the command is expensive, and must outlive a fault after it was computed.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], int]
    outputs: tuple[str, ...]
    kept: tuple[str, ...] = ()
    computed: bool = False


def scenarios(model: Path, clip: Path, latents: Path) -> list[Scenario]:
    """Return all commands that are tried."""
    import torch

    from diffsynth import VideoData, WanVideoPipeline, save_frames, save_video
    from diffsynth.cli.main import main
    from diffsynth.jobs.convert import convert_checkpoint

    size = [
        "--height",
        "32",
        "--width",
        "32",
        "--num-frames",
        str(FRAMES),
        "--steps",
        "2",
        "--seed",
        "1",
        "-q",
    ]
    size += ["--motion-guided-steps", "1", "--motion-inner-steps", "1"]
    frames = list(VideoData(clip))

    def reference(folder: Path) -> None:
        shutil.copy(clip, folder / "ref.mp4")

    def old_video(folder: Path) -> None:
        reference(folder)
        save_video(frames[:2], folder / "a.mp4")

    def jobs(folder: Path) -> None:
        reference(folder)
        rows = [{"prompt": "a cat", "reference": "ref.mp4", "output": name} for name in ("a.mp4", "b.mp4")]
        (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def transfer(*more: str) -> Callable[[Path], int]:
        words = ["--prompt", "a cat", "--model", model, *size, *more]
        return lambda folder: main(["transfer", folder / "ref.mp4", "-o", folder / "a.mp4", *words])

    def saved_call(folder: Path) -> int:
        pipe = WanVideoPipeline.from_pretrained(model, device="cpu")
        call = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": 2, "seed": 1}
        made = pipe(
            "a cat", **call, checkpoint_dir=folder / "state", checkpoint_every=1, progress_bar_cmd=None
        )
        return 0 if len(made) == FRAMES else 1

    def write(folder: Path) -> int:
        save_video(frames, folder / "a.mp4")
        return 0

    def write_pictures(folder: Path) -> int:
        with contextlib.suppress(FileExistsError):  # the same again
            save_frames(frames, folder / "pictures")
        return 0

    def convert(folder: Path) -> int:
        convert_checkpoint(model, folder / "half", torch.float16)
        return 0

    decode = ["decode", latents, "--model", model, "-q"]
    batch = ["--output-dir", "out", "--model", model, *size]
    latents_left = ("*-latents-*.safetensors",)
    return [
        Scenario(
            name="transfer", prepare=reference, command=transfer(), outputs=("a.mp4", "a.mp4.json"),
            kept=latents_left, computed=True,
        ),
        Scenario(
            name="transfer --overwrite", prepare=old_video, command=transfer("--overwrite"),
            outputs=("a.mp4", "a.mp4.json"), kept=latents_left, computed=True,
        ),
        Scenario(
            name="transfer --resume", prepare=reference,
            command=transfer("--resume", "--checkpoint-every", "1"), outputs=("a.mp4", "a.mp4.json"),
            kept=(".a.mp4.run", ".a.mp4.run/*", *latents_left), computed=True,
        ),
        Scenario(
            name="batch", prepare=jobs,
            command=lambda folder: main(
                ["batch", folder / "jobs.jsonl", *[folder / w if w == "out" else w for w in batch]]
            ),
            outputs=tuple(f"out/{name}{end}" for name in ("a.mp4", "b.mp4") for end in ("", ".json")),
            kept=("out", "out/.fastvmt-batch.lock", "out/*-latents-*.safetensors"), computed=True,
        ),
        Scenario(
            name="call with checkpoint_dir", prepare=reference, command=saved_call, outputs=(),
            kept=("state", "state/.lock", "state/*.safetensors"),
        ),
        Scenario(
            name="decode", prepare=reference,
            command=lambda folder: main([*decode, "-o", folder / "a.mp4"]), outputs=("a.mp4",),
        ),
        Scenario(name="save_video", prepare=old_video, command=write, outputs=("a.mp4",)),
        Scenario(
            name="save_frames", prepare=reference, command=write_pictures,
            outputs=("pictures", *(f"pictures/{index:05}.png" for index in range(len(frames)))),
        ),
        Scenario(name="convert", prepare=reference, command=convert, outputs=("half", "half/**/*")),
    ]  # fmt: skip


def contents(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return name -> what counts of the content of the outputs that are there."""
    from diffsynth import VideoData
    from diffsynth.data.files import sha256_of_file
    from diffsynth.runs.identity import sha256_of_frames
    from diffsynth.runs.record import read_record

    found = {}
    for path in sorted({path for name in names for path in folder.glob(name)}):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            found[name] = "folder"
        elif path.suffix == ".mp4":
            video = VideoData(path)
            found[name] = f"{len(video)} {sha256_of_frames(list(video))}"
        elif path.suffix == ".json" and name.endswith(".mp4.json"):
            found[name] = read_record(path).video["frames_sha256"]
        else:
            found[name] = sha256_of_file(path)
    return found


class Attempt:
    """One run of a scenario in a fork of this process, with or without a fault.

    Attributes:
        problems: what was not as promised.
        calls: number of system calls that were counted.
        code: the exit code.
        fault: the call that failed; empty if there was none.
        computed: denoising was finished.
    """

    def __init__(self, scenario: Scenario, folder: Path, fault: tuple[int, int, bool] | None) -> None:
        answer, marker = folder.parent / "answer.json", folder.parent / "computed"
        for path in (answer, marker):
            path.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            try:
                self._run(scenario, folder, fault, answer, marker)
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        if not answer.exists():
            if fault is None or fault[1] != KILL:
                raise SystemExit(f"{scenario.name}: the process died without an answer")
            answer.write_text(json.dumps({"calls": 0, "code": -signal.SIGKILL, "fault": "kill", "crash": ""}))
        facts: dict[str, Any] = json.loads(answer.read_text())
        self.calls, self.code, self.fault = facts["calls"], facts["code"], facts["fault"]
        self.problems = [facts["crash"]] if facts["crash"] else []
        self.computed = marker.exists()

    @staticmethod
    def _run(
        scenario: Scenario, folder: Path, fault: tuple[int, int, bool] | None, answer: Path, marker: Path
    ) -> None:
        from diffsynth.pipelines import generate

        library = ctypes.CDLL(os.environ["FAULTS"])
        library.fault_last.restype = ctypes.c_char_p
        plain = generate.decode_latents

        def noted(*given: Any) -> Any:
            marker.touch()
            return plain(*given)

        generate.decode_latents = noted
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        tempfile.tempdir = str(folder.parent / "tmp")
        number, error, lasting = fault or (0, 0, False)
        library.fault_arm(str(folder).encode(), ctypes.c_long(number), error, int(lasting))
        crash = ""
        try:
            code = scenario.command(folder)
        except (OSError, RuntimeError, ValueError) as failed:
            code = 1
            if "Error" not in type(failed).__name__:
                crash = repr(failed)
        except BaseException:  # noqa: BLE001  # whatever it is, it is told
            code, crash = 1, traceback.format_exc()
        calls = library.fault_disarm()
        told = library.fault_last().decode()
        answer.write_text(json.dumps({"calls": calls, "code": code, "fault": told, "crash": crash}))
        os._exit(0)


def strays(scenario: Scenario, folder: Path, before: set[str]) -> list[str]:
    """Return the names of files that are neither inputs, outputs nor allowed to stay."""
    known = {*before}
    for pattern in (*scenario.outputs, *scenario.kept):
        known |= {path.relative_to(folder).as_posix() for path in folder.glob(pattern)}
    return sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - known)


def try_fault(
    scenario: Scenario, root: Path, wanted: dict[str, str], fault: tuple[int, int, bool] | None
) -> tuple[Attempt, list[str]]:
    """Run a scenario with a fault, then without; return the first run and what was not as promised."""
    for name in ("work", "tmp"):
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).mkdir()
    folder = root / "work"
    scenario.prepare(folder)
    before = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    old = contents(folder, scenario.outputs)
    attempt = Attempt(scenario, folder, fault)
    problems = list(attempt.problems)
    now = contents(folder, scenario.outputs)
    if wanted:
        problems += [
            f"{name} is neither old nor new" for name in now if now[name] not in (old.get(name), wanted[name])
        ]
        if attempt.code == 0 and any(
            now.get(name) != wanted[name] for name in wanted if not name.endswith(".json")
        ):
            problems.append("it said that all went well, and it did not")
        if scenario.computed and attempt.computed and attempt.code > 0:
            kept = [*folder.rglob("*latents-*.safetensors"), *(root / "tmp").glob("*latents-*.safetensors")]
            new = [name for name in now if name.endswith(".mp4") and now[name] == wanted[name]]
            if not kept and not new:
                problems.append("the computed result is lost")
    if attempt.code >= 0:
        problems += [f"left lying: {name}" for name in strays(scenario, folder, before)]
    if fault is not None:
        again = Attempt(scenario, folder, None)
        problems += [f"again: {text}" for text in again.problems]
        if again.code != 0 or contents(folder, scenario.outputs) != wanted:
            problems.append(f"the same command again does not mend it (exit {again.code})")
        problems += [f"again, left lying: {name}" for name in strays(scenario, folder, before)]
    return attempt, problems


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="part of a scenario's name")
    parser.add_argument("--stride", type=int, default=1, help="every n-th call only")
    parser.add_argument(
        "--modes", type=int, default=1, help=f"ways to fail for each call, up to {len(MODES)}"
    )
    parser.add_argument("--kill", action="store_true", help="kill the process at the call")
    parser.add_argument("--json", type=Path, help="file for the table")
    args = parser.parse_args()
    if "FAULTS" not in os.environ:
        with tempfile.TemporaryDirectory() as name:
            library = Path(name) / "faults.so"
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
            env = {**os.environ, "FAULTS": str(library), "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=env, check=False).returncode)
    logging.disable(logging.CRITICAL)
    from diffsynth import WanVideoPipeline
    from diffsynth.testing import write_checkpoint, write_clip

    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = write_checkpoint(root / "tiny")
        clip = write_clip(root / "ref.mp4", num_frames=FRAMES, height=32, width=32)
        pipe = WanVideoPipeline.from_pretrained(model, device="cpu")
        call = {"height": 32, "width": 32, "num_frames": FRAMES, "num_inference_steps": 1, "seed": 1}
        pipe("a cat", **call, checkpoint_dir=root / "state", progress_bar_cmd=None)
        (latents,) = (root / "state").glob("latents-*.safetensors")
        print(
            "| command | calls | faults | as promised | exit 0 | exit 1 | exit 2 | killed |\n"
            "|---|--:|--:|--:|--:|--:|--:|--:|"
        )
        for scenario in scenarios(model, clip, latents):
            if args.only and args.only not in scenario.name:
                continue
            clean, problems = try_fault(scenario, root, {}, None)
            if clean.code != 0 or problems:
                raise SystemExit(f"{scenario.name} fails without a fault: {clean.code} {problems}")
            wanted = contents(root / "work", scenario.outputs)
            codes: Counter[int] = Counter()
            held = 0
            for index in range(1, clean.calls + 1, args.stride):
                for way in range(1 if args.kill else args.modes):
                    number, lasting = MODES[(index // args.stride + way) % len(MODES)]
                    if args.kill:
                        number, lasting = KILL, False
                    attempt, problems = try_fault(scenario, root, wanted, (index, number, lasting))
                    codes[attempt.code] += 1
                    held += not problems
                    if problems:
                        how = f"{errno.errorcode.get(number, 'kill')}{' from there on' if lasting else ''}"
                        where = f"{scenario.name}, call {index} ({attempt.fault}), {how}"
                        print(f"{where}: {'; '.join(problems)}", file=sys.stderr)
            tried = sum(codes.values())
            bad += tried - held
            rows.append({"command": scenario.name, "calls": clean.calls, "faults": tried, "held": held})
            ends = " | ".join(str(codes[code]) for code in (0, 1, 2, -signal.SIGKILL))
            print(f"| {scenario.name} | {clean.calls} | {tried} | {held} | {ends} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows))
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
