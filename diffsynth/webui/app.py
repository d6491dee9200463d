"""The page's layout, and the application of its server."""

import os
import tempfile
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from diffsynth.configs.defaults import EXACT
from diffsynth.configs.descriptors import DEFAULT_MODE
from diffsynth.configs.options import FITS, MODES
from diffsynth.webui import panel
from diffsynth.webui.page import Page, import_gradio
from diffsynth.webui.security import Guard
from diffsynth.webui.session import Session

_STRENGTH = "denoising_strength"  # a slider, which cannot be empty
VISITORS = 40  # pages that are served at a time; their runs wait in one queue
_NUMBERS = {"Steps": "num_inference_steps", "Height": "height", "Width": "width", "Frames": "num_frames"}
_PRESETS = "exact: the full method; balanced and fast: less computation, a little less likeness"
# Prompts to try: of shapes for a model that knows few words.
_SHAPES = (
    "a blue star on a yellow background", "a red square on a white background",
    "a yellow triangle on a blue background", "a green circle on a black background",
)  # fmt: skip
_SCENES = (
    "a red fox leaps through fresh snow", "a paper boat on a stormy sea", "an astronaut on a beach at sunset",
    "a hot-air balloon over lavender fields",
)  # fmt: skip
_PARTS = (
    ("start", "Reference from second", "0"), ("end", "to second", "its last"),
    ("ref_fps", "at frames a second", "its own"),
)  # fmt: skip


def build(page: Page) -> Any:
    """Return the gradio Blocks of the page."""
    gr, hints = import_gradio(), _hints(page.session)
    with gr.Blocks(title="FastVMT", analytics_enabled=False, fill_width=True) as demo:
        with gr.Row(elem_id="top"):
            gr.HTML("<h1>FastVMT</h1><p>A video's motion, a prompt's content.</p>")
            model = gr.Dropdown(list(page.sessions), label="Model", elem_id="model", **hints["model"])
        job_id, seen, is_owner = gr.State(None), gr.State([]), gr.State(value=False)
        names, chosen = gr.State([]), gr.State(None)
        with gr.Row(elem_id="main"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt", **hints["prompt"])
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
                expected = gr.HTML(elem_id="expected")
                status = gr.HTML(panel.IDLE, elem_id="panel")
            with gr.Column(elem_id="made"):
                plays = {"interactive": False, "loop": True, "autoplay": True}
                both = gr.Video(label="Reference | result", show_label=False, **plays)
                with gr.Row():
                    result = gr.Video(label="Result", elem_id="result", height=280, **plays)
                    motion = gr.Video(
                        label="Motion; blue: the reference's path", elem_id="motion", height=280, **plays
                    )
                files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
                again = gr.Button("Use these settings again", elem_id="use")
            with gr.Column(elem_id="options"):
                reference = gr.Video(label="Reference", sources=["upload"], height=200, elem_id="reference")
                look = gr.Button("Show the motion", elem_id="look")
                clip = gr.Textbox(label="Motion", visible=False)
                tries = gr.Examples(
                    _tries(page, page.session),
                    [reference, clip, prompt],
                    label="Try one of these",
                    elem_id="examples",
                )
                picture = gr.Image(
                    label="Picture that the video begins with",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=240,
                    elem_id="picture",
                    **hints["picture"],
                )
                beside = gr.Checkbox(label="Show it without transfer, too (a second run)", elem_id="beside")
                preset = gr.Radio(label="Preset", info=_PRESETS, elem_id="preset", **hints["preset"])
                modes = [(f"{m}: {d.help if d else 'the prompt alone'}", m) for m, d in MODES.items()]
                mode = gr.Dropdown(modes, value=DEFAULT_MODE, label="Mode", elem_id="mode")
                seed = gr.Number(precision=0, label="Seed", placeholder="a new one", elem_id="seed")
                negative, strength, scale, numbers, part = _more(gr, page.session)
        past = gr.Gallery(
            label="Past runs", columns=8, fit_columns=False, allow_preview=False, elem_id="past"
        )
        owners = _owners_row(gr, page, is_owner, status)
        more = [*numbers[1:], *part, model]
        asked = [prompt, negative, preset, mode, seed, strength, numbers[0], scale, *more]
        shown = [both, result, motion, files, chosen]
        many = {"concurrency_limit": VISITORS, "show_progress": "hidden", "trigger_mode": "multiple"}
        made = [status, job_id, *shown, past, names, seen]
        counted = [model, preset, mode, *numbers, *part, past]
        changes = [demo.load, *(field.change for field in counted)]
        gr.on(changes, page.expected, asked, expected, api_name=False)

        def hint(*chosen: str) -> list[dict]:
            return [gr.update(**hints) for hints in _hints(page.session_of(chosen[0]), chosen[1]).values()]

        hinted = [model, prompt, preset, *numbers, picture]
        gr.on([model.change, preset.change], hint, [model, preset], hinted, api_name=False)

        def follow(name: str) -> tuple[float, Any]:
            session = page.session_of(name)
            return session.defaults[_STRENGTH], gr.update(samples=_tries(page, session))

        model.input(follow, model, [strength, tries.dataset], api_name=False)
        prompt.change(None, status, status, js="said => said.includes('fv-error') ? '' : said")
        for handler in (Page.enter, Page.generate, Page.inspect):  # gradio knows by it what to pass
            handler.__annotations__["request"] = gr.Request
        Page.open_past.__annotations__["event"] = gr.SelectData
        sent = [reference, *asked[:-1], picture, beside, model, seen]  # the newest last: programs count
        go.click(page.generate, sent, made, api_name="generate", **many)
        look.click(page.inspect, [reference, *asked], [status, job_id, motion], api_name="inspect", **many)
        stop.click(page.cancel, job_id, status, api_name="cancel", queue=False)
        past.select(page.open_past, [names, seen], [status, *shown], api_name=False)
        again.click(page.settings, [chosen, seen], [status, reference, *asked, picture], api_name=False)
        empty = [seed, *numbers, *part[:-1]]  # gradio begins with 0 in a field for numbers
        demo.load(lambda: [None] * len(empty), None, empty, api_name=False)
        demo.load(page.enter, None, [seen, past, names, is_owner, owners], api_name=False)
    return demo.queue(max_size=4 * VISITORS)


def _tries(page: Page, session: Session) -> list[list[str]]:
    """Return the examples that a model can follow: path and name of a reference, and a prompt."""
    texts = cycle(_SHAPES if session.defaults.words else _SCENES)
    return [[path, Path(path).stem, next(texts)] for path in page.clips]


def _owners_row(gr: Any, page: Page, is_owner: Any, status: Any) -> Any:
    """Return the row by which who runs the page cancels any run."""
    with gr.Row(visible=False) as row:
        run = gr.Dropdown([], label="Runs of all visitors", elem_id="runs")
        again, end = gr.Button("Look again", elem_id="again"), gr.Button("Cancel that run", elem_id="end")
    hidden = {"api_name": False, "queue": False}
    again.click(page.all_runs, is_owner, run, **hidden)
    end.click(lambda job, is_owner: page.cancel(job if is_owner else None), [run, is_owner], status, **hidden)
    return row


def _hints(session: Session, preset: str = EXACT) -> dict[str, dict[str, Any]]:
    """Return what fields show of a model and a preset: arguments of the fields, in the page's order."""
    presets, words = [EXACT, *session.defaults.presets], session.defaults.words
    preset = preset if preset in presets else EXACT
    defaults = session.defaults.with_preset(preset)
    told = f"{defaults['width']}x{defaults['height']}, {defaults['num_frames']} frames"
    told += "" if words is None else f"; knows {len(words)} words: {', '.join(words)}"
    return {
        "model": {"value": session.folder.name, "info": told},
        "prompt": {"placeholder": (_SHAPES if words else _SCENES)[0]},
        "preset": {"choices": presets, "value": preset},
        **{key: {"placeholder": str(defaults[key])} for key in _NUMBERS.values()},
        "picture": {"visible": True} if session.sizes.takes_picture else {"visible": False, "value": None},
    }


def _more(gr: Any, session: Session) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """Return the fields that most visitors leave alone: negative prompt, two strengths, sizes, the part."""
    with gr.Accordion("More (empty: as shown)", open=False):
        negative = gr.Textbox(label="Negative prompt", elem_id="negative")
        with gr.Row():
            strength = gr.Slider(0.05, 1, value=session.defaults[_STRENGTH], label="Denoising strength")
            scale = gr.Slider(0.1, 4, value=1, label="Strength of the motion")
        with gr.Row():
            numbers = [
                gr.Number(precision=0, label=name, elem_id=name.lower(), **_hints(session)[key])
                for name, key in _NUMBERS.items()
            ]
        with gr.Row():
            part = [gr.Number(label=label, placeholder=value, elem_id=name) for name, label, value in _PARTS]
            part.append(gr.Dropdown(list(FITS), value="crop", label="Fit", elem_id="fit"))
    return negative, strength, scale, numbers, part


def make_app(
    page: Page,
    auth: tuple[str, str] | None = None,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
) -> Guard:
    """Return the server's application."""
    gr = import_gradio()
    from fastapi import FastAPI

    cache, megabytes = page.session.cache, page.session.limits.megabytes
    local = ("ui-sans-serif", "system-ui", "sans-serif")
    demo = build(page)
    demo.has_launched = True  # gradio checks the paths of files only in an app that it has launched itself
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        demo,
        path="/",
        auth=auth,
        allowed_paths=[str(cache)],
        max_file_size=f"{megabytes:g}mb",
        footer_links=[],
        theme=gr.themes.Soft(font=local, font_mono=("ui-monospace", "monospace")),
        css=panel.CSS,
    )
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    return Guard(app, uploads=uploads, cache=cache, host=host, allowed=allowed_hosts, megabytes=megabytes)


def temporary_folders() -> tuple[tempfile.TemporaryDirectory, Path]:
    """Return a folder that is removed at exit, and the cache in it; uploads arrive beside the cache."""
    held = tempfile.TemporaryDirectory(prefix="fastvmt-ui-")
    uploads, cache = Path(held.name, "uploads").resolve(), Path(held.name, "cache").resolve()
    uploads.mkdir()
    cache.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    return held, cache
