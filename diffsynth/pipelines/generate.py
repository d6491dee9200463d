"""A generation from its checked arguments to frames: stage after stage, saved as it goes on if asked to."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffsynth.configs.options import RunOptions
from diffsynth.data.tensors import Video
from diffsynth.pipelines.decode import latents_facts
from diffsynth.pipelines.denoise_run import Hooks, denoise_latents
from diffsynth.pipelines.events import stage
from diffsynth.pipelines.stages import Frames, decode_latents, encode_prompts, encode_video, make_noise
from diffsynth.planning.ladder import Holder, MemoryFallbacks
from diffsynth.runs.checkpoint import NoStore, RunStore, SavedRun, Saving, locked
from diffsynth.runs.cost import RunCost
from diffsynth.runs.identity import run_identity
from diffsynth.runs.signals import stoppable
from diffsynth.runs.state import RunInputs

if TYPE_CHECKING:
    from diffsynth.pipelines.wan_video import WanVideoPipeline


def generate(
    pipe: "WanVideoPipeline",
    prompts: list[str],
    negatives: list[str],
    video: Video | None,
    options: RunOptions,
    *,
    saving: Saving | None,
    latency_dir: str | Path | None,
    hooks: Hooks,
) -> list[Frames]:
    """A video for each prompt; `pipe.costs` gets what each took. See `WanVideoPipeline.__call__`."""
    fit = MemoryFallbacks(Holder(vae=pipe.vae, pipe=pipe), options)
    videos: list[Frames] = []
    with _store(pipe, prompts, negatives, video, options, saving) as store:
        inputs = store.inputs()
        if inputs is None:
            inputs = _encode(pipe, prompts, negatives, video, fit, hooks)
            store.keep_inputs(inputs)
        for index in range(len(prompts)):
            cost = RunCost(
                options.seed, options.mode, options.num_inference_steps, stage_seconds=dict(inputs.seconds)
            )
            pipe.costs.append(cost)
            saved = store.finished(index)
            if saved is not None:
                latents, finished = saved[0], True
                cost.restore(saved[1])
            else:
                latents, finished = denoise_latents(
                    pipe,
                    inputs.contexts[index],
                    inputs,
                    fit,
                    cost,
                    begun=store.begun(index),
                    step_done=store.step_done,
                    hooks=hooks,
                )
                if finished:
                    store.keep_latents(index, latents, latents_facts(pipe, options, video, cost))
                if latency_dir is not None:
                    cost.append_to(latency_dir)
            with stage("decode", hooks.observer, cost.stage_seconds):
                videos.append(fit.run("decode", partial(decode_latents, pipe, latents)))
            if pipe.interrupted():
                break
        if finished and len(videos) == len(prompts):
            store.done()
    pipe.options = fit.options
    return videos


@contextmanager
def _store(
    pipe: "WanVideoPipeline",
    prompts: list[str],
    negatives: list[str],
    video: Video | None,
    options: RunOptions,
    saving: Saving | None,
) -> Iterator[RunStore]:
    """Where the run is saved to; whatever ends it, its last finished step is kept."""
    if saving is None:
        yield NoStore()
        return
    with locked(saving.folder), stoppable(saving.folder, pipe.interrupt):
        identity = run_identity(pipe, prompts, negatives, video, options)
        run = SavedRun(saving, identity, options.seed, pipe.device)
        try:
            yield run
        finally:
            run.keep_latest()


def _encode(
    pipe: "WanVideoPipeline",
    prompts: list[str],
    negatives: list[str],
    video: Video | None,
    fit: MemoryFallbacks,
    hooks: Hooks,
) -> RunInputs:
    seconds: dict[str, float] = {}
    with stage("encode text", hooks.observer, seconds):
        contexts = fit.run("encode text", partial(encode_prompts, pipe, prompts, negatives))
    reference = None
    if video is not None:
        with stage("encode video", hooks.observer, seconds):
            reference = fit.run("encode video", partial(encode_video, pipe, video))
    noise = make_noise(pipe, fit.options)
    return RunInputs(contexts=contexts, noise=noise, reference=reference, seconds=seconds)
