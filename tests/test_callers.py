"""What callers do around a call: threads, states of torch, odd callbacks, numbers out of all bounds."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.evaluation.reference_flow import reference_flow
from diffsynth.pipelines import wan_video
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.testing import write_clip

RUN = {
    "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "output_type": "np",
    "progress_bar_cmd": iter,
}  # fmt: skip


@pytest.fixture
def pipe(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    pipe.enable_vram_management(num_persistent_param_in_dit=0)
    return pipe


@pytest.fixture
def clip(tmp_path):
    return VideoData(write_clip(tmp_path / "ref.mp4", num_frames=5, height=32, width=32))


@pytest.mark.slow
def test_calls_at_once_give_the_frames_that_each_gives_alone(pipe, clip):
    seeds = range(4)
    alone = [pipe("a cat", input_video=clip, seed=seed, **RUN) for seed in seeds]
    before = [weights_fingerprint(model) for model in pipe.residency.models.values()]

    def call(seed):
        (video,) = pipe.run("a cat", input_video=clip, seed=seed, **RUN)
        return video

    with ThreadPoolExecutor(5) as threads:
        flow = threads.submit(reference_flow, pipe, clip)
        videos = list(threads.map(call, seeds))
        assert flow.result().isfinite().all()
    for seed, frames, video in zip(seeds, alone, videos, strict=True):
        np.testing.assert_array_equal(video.frames, frames)
        assert (video.options.seed, video.cost.seed) == (seed, seed)
    assert [weights_fingerprint(model) for model in pipe.residency.models.values()] == before
    np.testing.assert_array_equal(pipe("a cat", input_video=clip, seed=2, **RUN), alone[2])


def test_a_callback_cannot_call_the_pipeline_that_runs_it(pipe):
    def callback(running, *_step):
        running("a dog", **RUN)

    with pytest.raises(RuntimeError, match="the pipeline is running: its callbacks cannot call it again"):
        pipe("a cat", callback_on_step_end=callback, **RUN)
    assert pipe("a cat", seed=0, **RUN).shape == (5, 32, 32, 3)


def test_an_interruption_is_of_the_running_call_only(pipe):
    begun, waiting = threading.Event(), threading.Event()
    steps = {"first": 0, "second": 0}

    def watch(name):
        def callback(running, *_step):
            steps[name] += 1
            if name == "first":
                begun.set()
                waiting.wait(600)
                running.interrupt()

        return callback

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pipe, "a cat", callback_on_step_end=watch("first"), **RUN)
        begun.wait(600)
        second = threads.submit(pipe, "a cat", callback_on_step_end=watch("second"), **RUN)
        waiting.set()
        first.result()
        second.result()
    assert steps == {"first": 1, "second": 3}


def steps_of(seen):
    return {
        **RUN,
        "mode": "No_transfer",
        "callback_on_step_end": lambda _pipe, step, *_more: seen.append(step),
    }


def test_an_interruption_while_the_call_reads_its_options_is_not_lost(pipe, monkeypatch):
    def interrupting(*given):
        pipe.interrupt()
        assert pipe.interrupted()
        return resolve(*given)

    seen = []
    resolve = wan_video.resolve
    with monkeypatch.context() as patched:
        patched.setattr(wan_video, "resolve", interrupting)
        assert pipe("a cat", **steps_of(seen)).shape == (5, 32, 32, 3)
    assert seen == []
    pipe.interrupt()  # no call runs: this stops none
    pipe("a cat", **steps_of(seen))
    assert (seen, pipe.interrupted()) == ([0, 1, 2], False)


def test_what_stops_a_run_stops_no_other(pipe):
    first, second, seen = threading.Event(), threading.Event(), []
    pipe("a cat", stop=first, **steps_of(seen))
    run = steps_of(seen)

    def late(running, step, *more):
        first.set()  # meant for the run that has ended
        run["callback_on_step_end"](running, step, *more)

    pipe("a cat", stop=second, **{**run, "callback_on_step_end": late})
    assert (seen, second.is_set()) == ([0, 1, 2] * 2, False)
    pipe("a cat", stop=first, **run)  # is set already: no step
    assert seen == [0, 1, 2] * 2
    pipe(
        "a cat", stop=second, **{**run, "callback_on_step_end": lambda *_step: second.set() or seen.append(9)}
    )
    assert seen[6:] == [9]


def test_an_interruption_is_of_the_call_whose_turn_it_is(pipe):
    """Also where another call began before it and waits."""
    seen, waits, ended = [], threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as threads, pipe.residency.exclusive():
        waiting = threads.submit(pipe, "a cat", **steps_of(seen))
        while not pipe._begun:
            waits.wait(0.01)
        pipe._running = ended  # of a call that ended before
        pipe.interrupt()  # no other runs: this means the one that waits
        waiting_stop = pipe._begun[0]
        assert waiting_stop.is_set()
        waiting_stop.clear()
        pipe._running = running = threading.Event()
        pipe._begun.append(running)
        pipe.interrupt()
        assert (running.is_set(), waiting_stop.is_set()) == (True, False)
        pipe._begun.remove(running)
    waiting.result()
    assert seen == [0, 1, 2]


def plain(pipe, clip):
    return pipe("a cat", input_video=clip, seed=3, motion={"guided_steps": 1, "inner_steps": 1}, **RUN)


def test_what_the_caller_has_set_in_torch_changes_nothing(pipe, clip):
    expected = plain(pipe, clip)
    with torch.inference_mode():
        np.testing.assert_array_equal(plain(pipe, clip), expected)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(plain(pipe, clip), expected)
    with torch.device("meta"):
        np.testing.assert_array_equal(plain(pipe, clip), expected)
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(plain(pipe, clip), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "bar", [lambda _steps: [], lambda steps: list(steps)[::-1], lambda _steps: [0] * 9, None]
)
def test_a_progress_bar_is_only_told(pipe, bar):
    run = {**RUN, "progress_bar_cmd": bar}
    np.testing.assert_array_equal(pipe("a cat", seed=3, **run), pipe("a cat", seed=3, **RUN))


def test_a_bar_that_takes_a_text_is_told_what_is_done(pipe, clip):
    told = []

    class Bar(list):
        def set_postfix_str(self, text, refresh):
            told.append((text.split(" loss ")[0], refresh))

    motion = {"guided_steps": 1, "inner_steps": 2, "interval": 1, "sf": 2, "block": 1}
    pipe("a cat", input_video=clip, motion=motion, seed=3, **{**RUN, "progress_bar_cmd": Bar})
    assert told == [("guided 1/1, motion", False), ("sampling", False), ("sampling", False)]


def test_an_empty_prompt_is_told_in_one_warning(pipe, caplog):
    pipe(" ", seed=3, **RUN)
    assert [r.message for r in caplog.records] == ["prompt is empty: the model chooses what the video shows"]


@pytest.mark.parametrize("name", ["progress_bar_cmd", "callback_on_step_end", "observer"])
def test_what_cannot_be_called_is_refused_by_name(pipe, name):
    with pytest.raises(TypeError, match=f"{name} must be a function or None; got 5"):
        pipe("a cat", **{**RUN, name: 5})


def test_what_cannot_stop_a_run_is_refused_by_name(pipe):
    with pytest.raises(TypeError, match=r"stop must be a threading\.Event or None; got True"):
        pipe("a cat", stop=True, **RUN)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_inference_steps", 10**9), ("height", 2**63), ("seed", 2**32), ("cfg_scale", 10**400)],
)
def test_numbers_out_of_all_bounds_are_refused_by_name(pipe, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a"):
        pipe("a cat", **{**RUN, name: value})


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("text_encoder", "the text encoder gave values that are not finite"),
        (
            "vae.encoder",
            r"the VAE's encoder \(in torch.float32\) gave values that are not finite; try",
        ),
        ("dit", "the DiT in denoising step 1 gave values that are not finite"),
        ("vae.decoder", r"the VAE's decoder \(in torch.float32\) gave values that are not finite"),
    ],
)
def test_values_that_are_not_finite_are_found_at_the_stage_that_made_them(pipe, clip, part, words):
    model = getattr(pipe, part.partition(".")[0])
    module = model.decoder if part == "vae.decoder" else model.encoder if part == "vae.encoder" else model
    with torch.no_grad():
        list(module.parameters())[-1].fill_(float("nan"))
    pipe.residency.stop_streaming()
    with pytest.raises(RuntimeError, match=words):
        pipe("a cat", input_video=clip, mode="No_transfer", **RUN)
