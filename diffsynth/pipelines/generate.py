"""A generation from resolved options to frames: encode, sample, decode.

If memory runs out, a stage is repeated one rung down the ladder of settings.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffsynth.configs.options import PICTURES, RunOptions
from diffsynth.data.tensors import chunks_to_uint8, finite
from diffsynth.pipelines.components import Components
from diffsynth.pipelines.decode import Frames, decode_latents
from diffsynth.pipelines.denoise import RunEvent, replaced_latents
from diffsynth.pipelines.image_condition import encode_pictures
from diffsynth.pipelines.sample import Progress, StepConsumer, sample
from diffsynth.planning.ladder import Ladder
from diffsynth.planning.reference import warn_of_reading
from diffsynth.runs.checkpoint import SavedRun
from diffsynth.runs.cost import RunCost
from diffsynth.runs.latents import keep_latents, latents_facts
from diffsynth.runs.state import PromptEmbeddings, RunInputs
from diffsynth.vram_management import memory_peaks, reset_peak_memory

Observer = Callable[[RunEvent], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedVideo:
    """A video, and how it was made.

    Attributes:
        frames: frames of the type that options.output_type names.
        latents: final latents [1, C, F, h, w] of the frames, on the CPU.
        prompt, negative_prompt, cost: its texts, and what it took.
        options: the options in force at the end; a lack of memory may have changed some.
    """

    frames: Frames
    latents: Tensor
    prompt: str
    negative_prompt: str
    options: RunOptions
    cost: RunCost


@torch.no_grad()
def generate(
    models: Components,
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    pictures: Mapping[str, Image.Image],
    options: RunOptions,
    ladder: Ladder,
    reads_db: float | None = None,
    *,
    on_step: StepConsumer,
    observer: Observer,
    progress: Progress,
    stop: Callable[[], bool],
    saved: SavedRun | None = None,
    fps: float | None = None,
) -> list[GeneratedVideo]:
    """Make a video for each prompt.

    Once stop() returns True, no further step begins, and the latents so far become the last video.

    Args:
        models: models of the pipeline.
        prompts: (prompt, negative prompt) of each video.
        pixels: the reference [1, 3, T, H, W] in [-1, 1]; None without one.
        pictures: those that are given, by argument of the call, as in PICTURES.
        options: resolved options; the ladder decides those that are still open.
        ladder: settings for when memory runs out.
        reads_db: PSNR in dB of the first frame below which a reference is said to be unreadable.
        on_step: consumes what the denoising loop yields, after guidance and after each step.
        observer: called when any other stage begins: encoding texts and video, decoding.
        progress: wraps the range of denoising steps, as tqdm does.
        stop: asked before each step, inside guidance, and after each video.
        saved: saved run to write to and to continue from; None if nothing is saved.
        fps: frames a second of the reference, written into the file of final latents.
    """
    noise_generator(options)  # fails before a model runs
    options = ladder.lowered(options)  # not before: what was asked for is the saved run's identity
    inputs = None if saved is None else saved.inputs
    if inputs is None:
        inputs, options = encode(models, prompts, pixels, pictures, options, ladder, observer, reads_db)
        if saved is not None:
            saved.keep_inputs(inputs)
    videos: list[GeneratedVideo] = []
    all_steps_done = True
    for index, (prompt, negative_prompt) in enumerate(prompts):
        cost = RunCost(
            options.seed, options.mode, options.num_inference_steps, stage_seconds=dict(inputs.seconds),
            stage_memory=dict(inputs.memory),
        )  # fmt: skip
        latents = None if saved is None else saved.finished(index, cost)
        if latents is None:
            one_pass = partial(sample, models, index, on_step=on_step, progress=progress, stop=stop)
            latents, options, all_steps_done = one_pass(inputs, options, ladder, cost, saved=saved)
            if all_steps_done and (second := options.second_pass) is not None:
                observer(RunEvent(stage="refine"))
                first_pass = replace(inputs, reference=latents, noise=draw_noise(models, second))
                latents, _, all_steps_done = one_pass(first_pass, second, ladder, cost, saved=None)
            if saved is not None and all_steps_done:
                saved.keep_latents(index, latents, latents_facts(models.vae, options.size, fps, cost))
        try:
            with stage("decode", observer, cost.stage_seconds, cost.stage_memory, models.device):
                frames, options = ladder.run("decode", partial(decode_latents, models, latents), options)
        except (RuntimeError, MemoryError, OSError) as error:
            if saved is None and latents.isfinite().all():  # the error names their file
                keep_latents(latents, latents_facts(models.vae, options.size, fps, cost), error)
            raise
        more: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "cost": cost}
        videos.append(GeneratedVideo(frames=frames, latents=latents.cpu(), options=options, **more))
        if stop() or not all_steps_done:
            break
    if saved is not None and all_steps_done and len(videos) == len(prompts):
        saved.done()
    return videos


def encode(
    models: Components,
    prompts: Sequence[tuple[str, str]],
    pixels: Tensor | None,
    pictures: Mapping[str, Image.Image],
    options: RunOptions,
    ladder: Ladder,
    observer: Observer,
    reads_db: float | None = None,
) -> tuple[RunInputs, RunOptions]:
    """Encode texts, reference and pictures, and draw noise; return also the options in force afterwards."""
    texts = {"positive": [prompt for prompt, _ in prompts]}
    if options.cfg_scale != 1 or options.low_noise_cfg_scale not in (1, None):
        texts["negative"] = [negative_prompt for _, negative_prompt in prompts]
    if options.motion is not None:
        texts["null"] = [""] * len(prompts)
    seconds: dict[str, float] = {}
    memory: dict[str, dict[str, int]] = {}
    timed = partial(stage, observer=observer, seconds=seconds, memory=memory, device=models.device)

    def encode_texts(_options: RunOptions) -> list[PromptEmbeddings]:
        flat = [text for group in texts.values() for text in group]
        cached = models.prompter.cached(flat, models.text_encoder)
        with nullcontext() if cached else models.residency.using("text_encoder"):
            rows = models.prompter.encode_prompt(flat, models.text_encoder).to(models.device)
        groups = [group.split(1) for group in rows.split(len(prompts))]
        return [PromptEmbeddings(**dict(zip(texts, row, strict=True))) for row in zip(*groups, strict=True)]

    def encode_video(pixels: Tensor, options: RunOptions) -> Tensor:
        with models.residency.using("vae"):
            latents = models.vae.encode(pixels, **options.tiling)
            if reads_db is not None:
                again = models.vae.decode(latents[:, :, :1], **options.tiling)
                warn_of_reading(pixels[:, :, :1], again, reads_db)
            return finite(latents, f"the VAE's encoder (in {models.vae.dtype})")

    with timed("encode text"):
        embeddings, options = ladder.run("encode text", encode_texts, options)
    reference = None
    if pixels is not None:
        with timed("encode video", reference=pixels):
            reference, options = ladder.run("encode video", partial(encode_video, pixels), options)
    shown = {"condition": pictures}
    if pixels is not None and options.motion is not None:  # read with the frames that it has in their places
        ends = zip(PICTURES, chunks_to_uint8([pixels[:, :, [0, -1]]], 2), strict=False)
        framed = {name: Image.fromarray(end) for name, end in ends if name in pictures}
        shown["reference_condition"] = {**pictures, **framed}
    encoded: dict[str, Any] = {"prompts": embeddings, "reference": reference}
    for name, own in shown.items():
        if own:
            encode_all = partial(encode_pictures, models, own)
            encoded[name], options = ladder.run("encode video", encode_all, options)
    return RunInputs(noise=draw_noise(models, options), seconds=seconds, memory=memory, **encoded), options


def draw_noise(models: Components, options: RunOptions) -> Tensor:
    """Return float32 noise [1, C, F, h, w] from the seed, drawn on rand_device: devices start alike."""
    frames = -(-(options.num_frames - 1) // models.vae.temporal_factor) + 1
    rows, cols = (side // models.vae.spatial_factor for side in (options.height, options.width))
    shape = (1, models.vae.z_dim, frames, rows, cols)
    generator = noise_generator(options)
    noise = torch.randn(shape, generator=generator, device=options.rand_device, dtype=torch.float32)
    return noise.to(models.device)


def watchers(
    pipe: object,
    progress_bar_cmd: Progress | None,
    observer: Observer | None,
    callback_on_step_end: Callable[..., dict | None] | None,
    stop: threading.Event | None,
) -> tuple[Progress, Observer, StepConsumer, threading.Event]:
    """Return what a run tells of its steps, and what stops it; None does nothing.

    The observer also tells a progress bar such as tqdm's what is done; the consumer of steps tells observer
    and callback, which is called with `pipe`. A TypeError names what is of another kind.
    """
    if stop is not None and not isinstance(stop, threading.Event):
        raise TypeError(f"stop must be a threading.Event or None; got {stop!r:.80}")
    called = {"progress_bar_cmd": progress_bar_cmd, "observer": observer}
    for name, call in {**called, "callback_on_step_end": callback_on_step_end}.items():
        if call is not None and not callable(call):
            raise TypeError(f"{name} must be a function or None; got {call!r:.80}")
    shown: Any = None
    before = ""

    def bar(steps: Iterable[int]) -> Iterable[int]:
        nonlocal shown
        shown = (progress_bar_cmd or iter)(steps)
        return shown

    def tell(event: RunEvent) -> None:
        nonlocal before
        ends_guided = (before, event.stage) == ("guidance", "sampling")  # what guidance did stays shown
        if event.steps and not ends_guided and hasattr(shown, "set_postfix_str"):
            shown.set_postfix_str(event.words, refresh=False)
        before = event.stage
        if observer is not None:
            observer(event)

    def consume(event: RunEvent) -> Tensor | None:
        replaced, latents = None, event.latents
        if callback_on_step_end and latents is not None and event.stage == "sampling":
            returned = callback_on_step_end(pipe, event.step - 1, event.timestep, {"latents": latents})
            replaced = None if returned in (None, {}) else replaced_latents(returned, latents)
        tell(event if replaced is None else replace(event, latents=replaced))
        return replaced

    return bar, tell, consume, threading.Event() if stop is None else stop


def noise_generator(options: RunOptions) -> torch.Generator:
    """Return a new random generator of the run's noise; ValueError if rand_device has none."""
    try:
        return torch.Generator(options.rand_device).manual_seed(options.seed)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"rand_device is {options.rand_device!r}, which has no random generator here ({error})"
        ) from error


@contextmanager
def stage(
    name: str,
    observer: Observer,
    seconds: dict,
    memory: dict,
    device: torch.device,
    reference: Tensor | None = None,
) -> Iterator[None]:
    """Notify the observer that a stage begins, and store its seconds and, on a CUDA device, its memory."""
    reset_peak_memory(device)
    observer(RunEvent(stage=name, reference=reference))
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - started
        memory |= {name: peaks} if (peaks := memory_peaks(device)) else {}
