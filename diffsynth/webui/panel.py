"""The panel of a run as HTML and SVG: stages, a bar, the motion loss, a moving preview. No scripts."""

import base64
from html import escape

from diffsynth.evaluation.figures import loss_sketch
from diffsynth.webui.gallery import PastRun
from diffsynth.webui.queue import WAITING, RunProgress

STAGES = ("encode text", "encode video", "denoise", "decode", "write")
_OF_DENOISING = ("guidance", "sampling")

IDLE = (
    '<div class="fv-idle">The result appears here: the motion of the reference, what the prompt says.</div>'
)


def message(text: str, kind: str = "note") -> str:
    """A line of text in a box. kind: note, done or error."""
    return f'<div class="fv-message fv-{escape(kind)}" role="status">{escape(text)}</div>'


def running(progress: RunProgress, state: str, ahead: int, seconds: float) -> str:
    """The panel of a job that is not done."""
    if state == WAITING:
        others = "1 run comes" if ahead == 1 else f"{ahead} runs come"
        return message(f"Waiting: {others} first." if ahead else "Waiting for the model.")
    parts = [_stages(progress.stage), _bar(progress), f'<p class="fv-line">{_line(progress, seconds)}</p>']
    pictures = []
    if progress.preview is not None:
        data = base64.b64encode(progress.preview).decode()
        pictures.append(
            "<figure><img alt='preview of the result' class='fv-preview' "
            f"src='data:image/webp;base64,{data}'><figcaption>preview</figcaption></figure>"
        )
    if len(progress.losses) > 1:
        pictures.append(
            f"<figure><img alt='motion loss' class='fv-curve' src='{loss_sketch(progress.losses)}'>"
            "<figcaption>motion loss</figcaption></figure>"
        )
    parts.append(f'<div class="fv-pictures">{"".join(pictures)}</div>')
    return f'<div class="fv-run">{"".join(parts)}</div>'


def finished(run: PastRun) -> str:
    """A few words about a run that is done."""
    record = run.record
    motion = record.options["motion"]
    facts = [
        "no transfer" if motion is None else motion["mode"],
        record.preset,
        f"seed {record.options['seed']}",
        f"{record.options['num_inference_steps']} steps",
        f"{record.video['width']}x{record.video['height']}, {record.video['frames']} frames",
        f"{run.seconds:.1f} s",
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
    return f'<div class="fv-bar"><i style="width:{100 * share:.0f}%"></i></div>'


def _line(progress: RunProgress, seconds: float) -> str:
    words = [progress.stage]
    if progress.steps:
        words.append(f"step {progress.step} of {progress.steps}")
    if progress.guided_steps:
        words.append(f"guided {progress.guided} of {progress.guided_steps}")
    if progress.losses:
        words.append(f"motion loss {progress.losses[-1]:.4g}")
    return escape(" · ".join([*words, f"{seconds:.0f} s"]))
