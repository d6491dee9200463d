"""The panel of a run as HTML without scripts: messages, stages, a bar, the motion loss, a preview."""

import base64
import errno
import logging
from html import escape
from pathlib import Path

from diffsynth.evaluation.figures import loss_sketch
from diffsynth.jobs.task import run_seconds
from diffsynth.planning.ladder import MemoryRanOutError, is_out_of_memory
from diffsynth.webui.gallery import PastRun
from diffsynth.webui.queue import WAITING, QueueFullError, RunProgress

logger = logging.getLogger(__name__)

STAGES = ("encode text", "encode video", "denoise", "decode", "write")
_OF_DENOISING = ("guidance", "sampling", "refine")

# Errors whose messages are shown to the user as they are.
_CLEAR = (ValueError, TypeError, FileNotFoundError, MemoryRanOutError, QueueFullError)
_LONGEST = 600  # characters of an error

IDLE = '<div class="fv-idle">Choose a video whose motion is used, and say what the new one shows.</div>'
CSS = Path(__file__).with_name("page.css").read_text()


def message(text: str, kind: str = "note") -> str:
    """Return a line of text in a box of the kind "note", "done" or "error"."""
    return f'<div class="fv-message fv-{escape(kind)}" role="status" aria-live="polite">{escape(text)}</div>'


def failed(error: BaseException) -> str:
    """Return the message box about an error; see `failure_text`."""
    return message(failure_text(error), "error")


def failure_text(error: BaseException) -> str:
    """Return a message about an error for the user; an unexpected error is logged with its traceback."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, _CLEAR):
        return text[:_LONGEST]
    if is_out_of_memory(error):
        return (
            "Memory ran out. Choose a smaller size, fewer frames or the preset fast; "
            f"the page keeps working. ({text.splitlines()[0][:200]})"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full: the video could not be written. ({error.strerror})"
    logger.error("a job failed", exc_info=error)
    return f"The run failed: {text[:_LONGEST]}"


def running(progress: RunProgress, state: str, ahead: int, seconds: float, behind: int = 0) -> str:
    """Return the panel of an unfinished job, before which others run; `behind` of the same visitor wait."""
    queued = message(f"Waiting: {_runs(behind)} of yours after this one.") if behind else ""
    if state == WAITING:
        return (
            message(f"Waiting: {_runs(ahead)} before yours." if ahead else "Waiting for the model.") + queued
        )
    pictures = ""
    if progress.preview is not None:
        data = base64.b64encode(progress.preview).decode()
        pictures += (
            "<figure><img alt='preview of the result' class='fv-preview' "
            f"src='data:image/webp;base64,{data}'><figcaption>preview</figcaption></figure>"
        )
    if len(progress.losses) > 1:
        pictures += (
            f"<figure><img alt='motion loss' class='fv-curve' src='{loss_sketch(progress.losses)}'>"
            "<figcaption>motion loss</figcaption></figure>"
        )
    told = f'{_stages(progress.stage)}{_bar(progress)}<p class="fv-line">{_line(progress, seconds)}</p>'
    return f'{queued}<div class="fv-run">{told}<div class="fv-pictures">{pictures}</div></div>'


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def finished(run: PastRun) -> str:
    """Return the panel of a finished run, with its prompt and options."""
    record = run.record
    motion = record.options["motion"]
    facts = [
        "no transfer" if motion is None else motion["mode"],
        record.preset,
        f"seed {record.options['seed']}",
        f"{record.options['num_inference_steps']} steps",
        f"{record.video['width']}x{record.video['height']}, {record.video['frames']} frames",
        f"{run_seconds(record):.1f} s",
    ]
    return (
        f'<div class="fv-result"><strong>{escape(record.prompt)}</strong>'
        f"<span>{escape(' · '.join(map(str, facts)))}</span>"
        f"<span>{escape(run.video.name)}</span></div>"
    )


def _stages(stage: str) -> str:
    now = "denoise" if stage in _OF_DENOISING else stage
    reached = STAGES.index(now) if now in STAGES else -1
    kinds = ["done" if i < reached else "now" if i == reached else "next" for i in range(len(STAGES))]
    marks = (f'<li class="{kind}">{name}</li>' for name, kind in zip(STAGES, kinds, strict=True))
    return f'<ol class="fv-stages">{"".join(marks)}</ol>'


def _bar(progress: RunProgress) -> str:
    share = progress.step / progress.steps if progress.steps else 0.0
    percent = f"{100 * share:.0f}"
    told = f'role="progressbar" aria-label="steps" aria-valuemax="100" aria-valuenow="{percent}"'
    return f'<div class="fv-bar" {told}><i style="width:{percent}%"></i></div>'


def _line(progress: RunProgress, seconds: float) -> str:
    words = [progress.stage]
    if progress.steps:
        words.append(f"step {progress.step} of {progress.steps}")
    if progress.guided_steps:
        words.append(f"guided {progress.guided} of {progress.guided_steps}")
    if progress.losses:
        words.append(f"motion loss {progress.losses[-1] - 1:+.0%}")
    words.append(f"{seconds:.0f} s")
    if 0 < progress.step < progress.steps:
        words.append(f"about {seconds * (progress.steps / progress.step - 1):.0f} s left")
    return escape(" · ".join(words))
