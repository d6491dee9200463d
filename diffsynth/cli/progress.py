"""Run a task for a command: saved or not, with progress on stderr, and stopped by Ctrl-C."""

import signal
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]  # its stubs are a separate package

from diffsynth.cli.arguments import flag
from diffsynth.cli.console import Console
from diffsynth.configs.fields import options_of
from diffsynth.configs.options import LoadOptions, SavingOptions
from diffsynth.jobs.errors import RunFailedError, UsageError
from diffsynth.jobs.task import MadeVideo, VideoTask, run_task, saving_folder
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.pipelines.wan_video import WanVideoPipeline
from diffsynth.runs.signals import RunInterrupted, handling

INTERRUPTED_TEXT = "interrupted; no video was written"


def saving_arguments(options: Namespace, output: Path | None) -> dict[str, Any]:
    """Return a run's saving arguments from the options of `add_saving_options`; empty if nothing is saved.

    The video's path decides the default folder. UsageError: the folder is unknown, or saving options are
    given although nothing is saved.
    """
    details = {name: value for name, value in vars(options).items() if name in options_of(SavingOptions)}
    resume, folder = details.pop("resume", None), options.checkpoint_dir
    if resume is None and folder is None:
        if details:
            raise UsageError(f"{flag(min(details))} needs --resume or --checkpoint-dir")
        return {}
    if folder is None:
        if output is None:
            raise UsageError("--resume needs -o OUT, or --checkpoint-dir")
        folder = saving_folder(output)
    return {"checkpoint_dir": folder, "resume": resume is not False, **details}


def run_watched(
    pipe: WanVideoPipeline, task: VideoTask, model: Mapping[str, Any], loaded: LoadOptions, console: Console
) -> MadeVideo:
    """Run a task like `run_task`, with progress on stderr.

    Ctrl-C stops a saved run at once, as in `runs.signals`, and an unsaved one after its current step.
    """
    progress = StageProgress(console)

    def stop(_signal: int, _frame: object) -> None:
        if progress.stopping.is_set():
            raise KeyboardInterrupt(INTERRUPTED_TEXT)
        progress.stopping.set()
        console.problem("stopping after this step; Ctrl-C again stops at once")

    try:
        with closing(progress), handling([] if task.saving else [signal.SIGINT], stop):
            made = run_task(pipe, task, model, loaded, progress, progress.stopping)
    except RunInterrupted as stopped:
        again = f"finished steps are in {stopped.folder}; run the same command again to continue"
        raise KeyboardInterrupt(f"stopped; {again}") from stopped
    except FileNotFoundError as error:
        raise RunFailedError(str(error)) from error  # usage errors are found before a run
    except (ValueError, RuntimeError, OSError) as error:
        # Ctrl-C also reaches the ffmpeg that decodes the reference, and the run then lacks its frames.
        if progress.stopping.is_set():
            raise KeyboardInterrupt(INTERRUPTED_TEXT) from error
        raise
    if task.output is not None and made.path != task.output:
        console.problem(f"{task.output} was created meanwhile: the video is in {made.path}")
    return made


class StageProgress:
    """An observer of a run: a line for each stage, and for the denoising steps a bar, or lines in a pipe.

    Once `stopping` is set, it raises KeyboardInterrupt when the next stage begins, before any decoding.
    """

    def __init__(self, console: Console) -> None:
        self.stopping = threading.Event()
        self._console = console
        self._bar: tqdm | None = None
        self._doing, self._guided = "", 0
        self._begun: tuple[int, float] | None = None  # the first step that is seen, and when

    def __call__(self, event: RunEvent) -> None:
        if event.steps == 0:
            if self.stopping.is_set():
                raise KeyboardInterrupt(INTERRUPTED_TEXT)
            self.close()
            self._console.note(event.stage)
        elif event.stage == "guidance":
            self._guided = event.step
            self._doing = event.words
            self._show(event.step - 1, None)
        else:
            if event.step > self._guided:
                self._doing = "sampling"
            self._show(event.step, event.steps)

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._begun, self._guided = None, None, 0

    def _show(self, step: int, steps: int | None) -> None:
        """Show that `step` of `steps` steps are done; their number is known from the first sampling event."""
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm(total=steps, file=sys.stderr, disable=self._console.quiet, unit="step")
            self._bar.total = self._bar.total if steps is None else steps
            self._bar.set_description_str(self._doing)
            self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        first, begun = self._begun = self._begun or (step, now)
        if steps is not None and step * 10 // steps > (step - 1) * 10 // steps:
            left = (now - begun) / max(step - first, 1) * (steps - step)
            done = f"{step / steps:4.0%}, step {step}/{steps}: {now - begun:.0f} s"
            self._console.note(f"{done}, {left:.0f} s left; {self._doing}")
