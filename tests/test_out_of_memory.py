"""Memory that runs out, stage by stage: what is given up, that no finished step and no tensor is lost, what
the error says where nothing is left.
"""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.caches import CacheOptions
from diffsynth.configs.options import RunOptions
from diffsynth.jobs.decode import decode_saved
from diffsynth.motion import MotionGuidance
from diffsynth.planning import ladder, settings
from diffsynth.planning.ladder import HELP, Ladder, MemoryRanOutError, is_out_of_memory
from diffsynth.planning.settings import Settings, following, smaller_tiles
from diffsynth.runs.checkpoint import STEP
from diffsynth.runs.state import load_state
from diffsynth.testing import write_clip

STEPS = 3
SMALL = {
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "seed": 1,
    "progress_bar_cmd": list,
    "output_type": "latent",
    "tiled": False,
    "tile_size": (3, 4),
    "tile_stride": (2, 3),
}
MOTION = MotionGuidance(
    guided_steps=2, inner_steps=2, interval=1, block=1, window=3, tile=(1, 1), sf=2, checkpoint="none"
)
WORDS = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return VideoData(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 9, height=32, width=48))


def run(pipe, prompt="a cat", **options):
    return pipe(prompt, **{**SMALL, **options})


@contextmanager
def failing(module, fails):
    """Inside this context a module's calls fail where fails(number of the call from 0, inputs) is true."""
    calls = []

    def hook(_module, inputs):
        calls.append(1)
        if fails(len(calls) - 1, inputs):
            raise torch.cuda.OutOfMemoryError(WORDS)

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_batch_of_two_that_does_not_fit_becomes_two_calls(pipe, caplog):
    two_calls, one_call = run(pipe, batch_cfg=False), run(pipe, batch_cfg=True)
    with failing(pipe.dit.blocks[1], lambda _, inputs: len(inputs[0]) == 2):
        assert torch.equal(run(pipe, batch_cfg=True), two_calls)
    (warning,) = warnings(caplog)
    assert warning.startswith(
        "memory ran out in the stage 'sampling': the prompts run in two calls, batch_cfg=F"
    )
    assert WORDS in warning
    # Later on, steps that are done stay as they are; the two ways round otherwise.
    with failing(pipe.dit.blocks[1], lambda call, _: call == 2) as calls:
        moved = run(pipe, batch_cfg=True)
    assert len(calls) == 3 + 2
    torch.testing.assert_close(moved, one_call, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("times", [1, 2])
def test_guidance_that_does_not_fit_keeps_less_and_gives_the_same_bits(pipe, clip, caplog, times):
    whole = run(pipe, input_video=clip, motion=MOTION)
    losses = pipe.costs[0].losses
    # Calls 0 and 1: the reference, and the first gradient; after each failure the step begins anew.
    with failing(pipe.dit.blocks[0], lambda call, _: call in range(1, 2 * times, 2)):
        assert torch.equal(run(pipe, input_video=clip, motion=MOTION), whole)
    assert pipe.costs[0].losses == losses
    said = warnings(caplog)
    assert ["checkpoint='attention'" in said[0], len(said)] == [True, times]
    assert times == 1 or "checkpoint='block'" in said[1]


def nothing_but_again(_stage, now, **_facts):
    yield "nothing", now


CACHES = {
    "none": {"sampler": "unipc", "motion": replace(MOTION, recompute_every=2)},
    "teacache": {"cache": CacheOptions(name="teacache", threshold=1e9, model_id="Wan2.1-T2V-1.3B")},
    "first_block": {"cache": CacheOptions(name="first_block", threshold=9.0), "batch_cfg": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
def test_the_failed_step_is_done_again_from_the_same_bits(pipe, clip, monkeypatch, kind):
    monkeypatch.setattr(ladder, "following", nothing_but_again)
    options = {"input_video": clip, "motion": MOTION, **CACHES[kind]}
    with failing(pipe.dit.blocks[0], lambda *_: False) as calls:
        whole = run(pipe, **options)
    found = pipe.costs[0].losses, pipe.costs[0].gradient_evaluations
    for failed in range(0, len(calls), 1 if kind == "none" else 3):
        steps = []
        with failing(pipe.dit.blocks[0], lambda call, _, failed=failed: call == failed):
            again = run(pipe, **options, callback_on_step_end=lambda _, step, *__, s=steps: s.append(step))
        assert torch.equal(again, whole)
        assert steps == list(range(STEPS)), "finished steps are not done again"
        assert (pipe.costs[0].losses, pipe.costs[0].gradient_evaluations) == found


def test_nothing_of_the_failed_step_is_alive_when_it_is_done_again(pipe):
    seen, alive = [], []

    def keep(_module, _inputs, output):
        seen.append(weakref.ref(output))

    def look_and_fail(call, _inputs):
        # At the failure block 1 is about to work on what block 0 gave; at the retry that must be gone.
        alive.append(seen[0]() is not None)
        return call == 0

    handle = pipe.dit.blocks[0].register_forward_hook(keep)
    with failing(pipe.dit.blocks[1], look_and_fail):
        run(pipe, batch_cfg=True)
    handle.remove()
    assert alive[:2] == [True, False]


def test_a_reference_that_does_not_fit_is_encoded_in_tiles(pipe, clip, caplog):
    tiled = run(pipe, input_video=clip, mode="No_transfer", tiled=True)
    assert not torch.equal(tiled, run(pipe, input_video=clip, mode="No_transfer"))
    with failing(pipe.vae.encoder, lambda call, _: call == 1):
        assert torch.equal(run(pipe, input_video=clip, mode="No_transfer"), tiled)
    (warning,) = warnings(caplog)
    assert (
        "in the stage 'encode video': the VAE runs with tiled=True, tile_size=(3, 4), tile_stride=(2, 3)"
        in warning
    )


@pytest.mark.slow
def test_a_decode_that_does_not_fit_takes_tiles_and_then_smaller_ones(pipe, caplog, monkeypatch):
    monkeypatch.setattr(settings, "SMALLEST_TILE", 1)
    halves = run(pipe, output_type="np", tiled=True, tile_size=(1, 2), tile_stride=(1, 1))
    with failing(pipe.vae.decoder, lambda _, inputs: inputs[0].shape[-1] > 2):
        assert np.array_equal(run(pipe, output_type="np"), halves)
    assert ["tile_size=(3, 4)" in w for w in warnings(caplog)] == [True, False]
    assert "tile_size=(1, 2), tile_stride=(1, 1)" in warnings(caplog)[1]


def test_saved_latents_decode_in_smaller_tiles_too(pipe, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(settings, "SMALLEST_TILE", 2)
    run(pipe, checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("latents-*")
    with failing(pipe.vae.decoder, lambda _, inputs: inputs[0].shape[-1] > 3):
        frames = decode_saved(path, pipe.vae, output_type="np")
    small = decode_saved(path, pipe.vae, tile_size=(2, 3), tile_stride=(1, 1), output_type="np")
    assert np.array_equal(frames, small)
    assert "tile_size=(2, 3), tile_stride=(1, 1)" in warnings(caplog)[0]


@pytest.mark.slow
def test_where_nothing_helps_the_error_says_where_how_much_and_what_would(pipe, clip, tmp_path, caplog):
    whole = run(pipe, input_video=clip, motion=MOTION)

    def from_the_second_step_on(call, _inputs):
        return call >= 6

    message = (
        r"memory ran out in the stage 'guidance' \(CUDA out of memory. Tried to allocate 2.00 GiB.*\); cpu "
        r"has \d+\.\d GiB free; tried: .*='attention', .*='block', .*='offload'. What helps: motion with"
    )
    with (
        failing(pipe.dit.blocks[0], from_the_second_step_on),
        pytest.raises(MemoryRanOutError, match=message),
    ):
        run(pipe, input_video=clip, motion=MOTION, checkpoint_dir=tmp_path)
    assert len(warnings(caplog)) == 3
    _, facts = load_state(tmp_path / STEP)
    assert (facts["step"], facts["settings"]["checkpoint"]) == (1, "none")
    assert torch.equal(run(pipe, input_video=clip, motion=MOTION, checkpoint_dir=tmp_path), whole)


def test_what_was_given_up_stays_so_in_a_run_that_goes_on(pipe, tmp_path, caplog):
    def stop(_pipe, step, *_):
        if step == 2:
            raise KeyError

    fails = failing(pipe.dit.blocks[1], lambda _, inputs: len(inputs[0]) == 2)
    with fails, pytest.raises(KeyError):
        run(pipe, batch_cfg=True, callback_on_step_end=stop, checkpoint_dir=tmp_path)
    assert len(warnings(caplog)) == 1
    with failing(pipe.dit.blocks[1], lambda _, inputs: len(inputs[0]) == 2):
        resumed = run(pipe, batch_cfg=True, checkpoint_dir=tmp_path)
    assert torch.equal(resumed, run(pipe, batch_cfg=False))
    assert len(warnings(caplog)) == 1


def test_other_errors_are_left_as_they_are(pipe, caplog):
    def broken(*_):
        raise RuntimeError("a kernel is broken")

    handle = pipe.dit.blocks[0].register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a kernel is broken"):
        run(pipe, batch_cfg=True)
    handle.remove()
    assert warnings(caplog) == []


def test_real_failures_to_allocate_are_known_as_such():
    for allocate in (lambda: torch.empty(10**15), lambda: np.empty(10**16)):
        with pytest.raises((RuntimeError, MemoryError)) as failure:
            allocate()
        assert is_out_of_memory(failure.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


TILES = {"tile_size": (30, 52), "tile_stride": (15, 26)}


def all_rungs(stage, accelerator):
    """The words of every rung below the fastest settings."""
    now, words = Settings(tiled=True, **TILES), []
    facts = {"accelerator": accelerator, "num_blocks": 30, "picture": (60, 104)}
    while (below := next(following(stage, now, **facts), None)) is not None:
        words.append(below[0])
        now = below[1]
    return words


def test_a_stage_goes_down_rung_by_rung_and_weights_move_only_where_there_is_an_accelerator():
    rest = "each model is on the device during its own stage only"
    stream = [f"the blocks of the DiT but {count} are streamed from CPU memory" for count in (15, 0)]
    keep = [
        f"guidance runs with checkpoint={checkpoint!r}" for checkpoint in ("attention", "block", "offload")
    ]
    two_calls = "the prompts run in two calls, batch_cfg=False"
    assert all_rungs("guidance", accelerator=True) == [rest, *stream, *keep]
    assert all_rungs("guidance", accelerator=False) == keep
    assert all_rungs("sampling", accelerator=True) == [rest, two_calls, *stream]
    assert all_rungs("sampling", accelerator=False) == [two_calls]
    text = "the blocks of the text encoder are streamed from CPU memory"
    assert all_rungs("encode text", accelerator=True) == [rest, text]
    assert all_rungs("encode text", accelerator=False) == []
    assert len(all_rungs("decode", accelerator=False)) == 3


def test_models_are_placed_where_the_next_rung_says():
    placed = []

    class Placing:
        device, offload, streaming, staying = torch.device("meta"), False, (), ()
        models: ClassVar = {"dit": SimpleNamespace(blocks=[torch.nn.Linear(2, 2)] * 4)}

        def rest(self):
            placed.append("rest")

        def stop_streaming(self):
            placed.append("whole")

        def stream(self, name, _blocks, parameters):
            placed.append((name, parameters))
            self.streaming = (name,)

    steps = Ladder(Placing(), SimpleNamespace(spatial_factor=8))
    options = RunOptions(motion=MOTION)
    for _ in range(2):
        options = steps.next("guidance", options, "no memory")
    assert placed == ["whole", "rest", "whole", "rest", ("dit", 2 * 6)]
    assert options.motion.checkpoint == "none"
    assert steps.next("guidance", options, "no memory").motion.checkpoint == "attention"


@pytest.mark.parametrize(
    ("tiled", "size", "expected"),
    [
        (False, (30, 52), ((30, 52), (15, 26))),
        (True, (30, 52), ((15, 26), (7, 13))),
        (True, (15, 26), ((8, 13), (3, 6))),
        (True, (8, 13), ((8, 8), (4, 3))),
        (True, (8, 8), None),
        (True, (6, 7), None),
        (False, (90, 120), ((30, 52), (15, 26))),
    ],
)
def test_tiles_are_halved_down_to_the_smallest(tiled, size, expected):
    now = Settings(tiled=tiled, tile_size=size, tile_stride=tuple(n // 2 for n in size))
    smaller = smaller_tiles(now, (60, 104))
    if expected is None:
        assert smaller is None
    else:
        assert (smaller.tiled, smaller.tile_size, smaller.tile_stride) == (True, *expected)


def test_every_stage_has_its_advice():
    assert HELP.keys() == {"encode text", "encode video", "guidance", "sampling", "decode"}


def test_memory_of_the_cpu_that_runs_out_is_named(pipe, monkeypatch):
    def fail(*_args, **_kwargs):
        raise MemoryError

    monkeypatch.setattr(type(pipe.prompter), "encode_prompt", fail)
    with pytest.raises(
        MemoryRanOutError, match=r"'encode text' \(MemoryError\); cpu has .*What helps: a text enc"
    ):
        run(pipe, "never asked before")


@pytest.mark.parametrize(
    ("words", "free", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", 0.5, True),
        ("HIP out of memory. Tried to allocate 2.00 GiB", 0.5, True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", 0.5, True),
        ("CUDA driver error: out of memory", 0.5, True),
        ("Triton Error [CUDA]: out of memory", 0.5, True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", 0.5, True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", 0.5, True),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", 0.5, True),
        ("MPS backend out of memory (MPS allocated: 9.00 GB)", 0.5, True),
        ("Unable to find a valid cuDNN algorithm to run convolution", 0.02, True),
        ("GET was unable to find an engine to execute this computation", 0.02, True),
        ("GET was unable to find an engine to execute this computation", 0.5, False),
        ("out of resource: shared memory, Required: 147456, Hardware limit: 101376", 0.02, False),
        ("CUDA error: no kernel image is available for execution on the device", 0.02, False),
    ],
)
def test_every_way_to_say_that_memory_ran_out_is_understood(monkeypatch, words, free, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 24 * 2**30), 24 * 2**30))
    assert ladder.is_out_of_memory(RuntimeError(words)) == expected
    assert not ladder.is_out_of_memory(ValueError(words))
