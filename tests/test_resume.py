"""Runs that stop and go on: the same bits, whatever stopped them and wherever; what is refused, and how."""

import errno
import os
import signal
import threading

import numpy as np
import pytest
import torch

from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.cache_tables import MagRatios
from diffsynth.configs.caches import CacheOptions
from diffsynth.jobs.decode import decode_saved
from diffsynth.motion import MotionGuidance
from diffsynth.runs import state as run_state
from diffsynth.runs.checkpoint import INPUTS, STEP, clear_checkpoints, run_lock
from diffsynth.runs.identity import weights_fingerprint
from diffsynth.runs.latents import read_latents
from diffsynth.runs.signals import RunInterrupted
from diffsynth.runs.state import load_state, save_state
from diffsynth.testing import write_clip

pytestmark = pytest.mark.slow

STEPS = 4
SMALL = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": STEPS,
    "seed": 1,
    "progress_bar_cmd": list,
    "output_type": "latent",
}
MOTION = {
    "guided_steps": 3, "inner_steps": 2, "interval": 1, "block": 1, "window": 3, "tile": (1, 1), "sf": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return VideoData(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 9, height=32, width=32))


class Boom(Exception):
    """What ends a run in these tests."""


def stop_at(step):
    def callback(_pipe, index, _timestep, _kwargs):
        if index == step:
            raise Boom

    return callback


def run(pipe, prompt="a cat", **options):
    return pipe(prompt, **{**SMALL, **options})


def break_off(pipe, folder, step, prompt="a cat", **options):
    """A run that ends in the middle of its step `step`, from 0, after the network's work."""
    with pytest.raises(Boom):
        run(pipe, prompt, callback_on_step_end=stop_at(step), checkpoint_dir=folder, **options)


def costs(pipe):
    return [(c.losses, c.gradient_evaluations, c.dit_block_calls, len(c.time_guidance)) for c in pipe.costs]


RATIOS = MagRatios((1.0, 0.99, 0.98, 0.97))
VARIANTS = {
    "euler": {},
    "unipc": {"sampler": "unipc"},
    "renoise": {"sampler": "renoise", "sigmas": (0.96, 0.9, 0.6, 0.3)},
    "recompute": {"motion": MotionGuidance(**MOTION, recompute_every=3), "sampler": "unipc"},
    "recompute below": {"motion": MotionGuidance(**MOTION, recompute_every=2, recompute_below=0.9)},
    "extrapolate": {"motion": MotionGuidance(**{**MOTION, "interval": 2}, reuse="extrapolate")},
    "teacache": {"cache": CacheOptions(name="teacache", threshold=1e9, model_id="Wan2.1-T2V-1.3B")},
    "magcache": {"cache": CacheOptions(name="magcache", threshold=0.5, ratios=RATIOS, retention=0)},
    "first_block": {"cache": CacheOptions(name="first_block", threshold=9.0), "sampler": "unipc"},
    "interval": {
        "cache": CacheOptions(name="first_block", threshold=9.0),
        "cfg_interval": (0.25, 0.75),
        "batch_cfg": True,
    },
    "latent prediction": {
        "motion": MotionGuidance.for_mode(
            "FlowMotion", {"guided_steps": 3, "inner_steps": 1, "block": None, "sf": 2}
        )
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_that_goes_on_gives_the_same_bits_from_every_step(pipe, clip, tmp_path, monkeypatch, variant):
    options = {"motion": MotionGuidance(**MOTION), "input_video": clip, **VARIANTS[variant]}
    whole = run(pipe, **options)
    spent = costs(pipe)
    for step in range(1, STEPS):
        break_off(pipe, tmp_path, step, **options)
        assert load_state(tmp_path / STEP)[1]["step"] == step
        with monkeypatch.context() as patch:
            patch.setattr(pipe.text_encoder, "forward", None)
            patch.setattr(pipe.vae, "encode", None)
            pipe.prompter.clear()
            told = []
            resumed = run(pipe, **options, checkpoint_dir=tmp_path, observer=told.append)
        assert torch.equal(resumed, whole)
        assert [e.step for e in told if e.stage == "sampling"] == list(range(step + 1, STEPS + 1))
        if variant not in ("magcache", "teacache", "first_block", "interval"):
            assert costs(pipe) == spent
        assert costs(pipe)[0][0] == spent[0][0]
        clear_checkpoints(tmp_path)


def test_a_cache_that_goes_on_skips_the_steps_that_it_would_have_skipped(pipe, tmp_path):
    for name in ("teacache", "magcache", "first_block"):
        options = {**VARIANTS[name], "num_inference_steps": STEPS}
        run(pipe, **options)
        (whole,) = pipe.costs
        assert whole.dit_block_calls < STEPS * 2 * 2, f"{name} never skips here"
        break_off(pipe, tmp_path, 2, **options)
        run(pipe, **options, checkpoint_dir=tmp_path)
        # One step was broken off after its work, and done again; it is in no finished step's count.
        assert pipe.costs[0].dit_block_calls == whole.dit_block_calls
        clear_checkpoints(tmp_path)


def test_a_run_killed_in_its_first_step_starts_there_and_encodes_nothing_again(pipe, tmp_path, monkeypatch):
    break_off(pipe, tmp_path, 0)
    assert {path.name for path in tmp_path.iterdir()} == {INPUTS, ".lock"}
    whole = run(pipe)
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    pipe.prompter.clear()
    assert torch.equal(run(pipe, checkpoint_dir=tmp_path), whole)


def test_prompt_lists_go_on_at_the_prompt_that_was_reached(pipe, tmp_path):
    prompts = ["a cat", "a dog", "a bird"]
    whole = run(pipe, prompts)
    seen = []

    def stop(_pipe, index, _timestep, _kwargs):
        seen.append(index)
        if len(seen) == STEPS + 2:
            raise Boom

    with pytest.raises(Boom):
        run(pipe, prompts, callback_on_step_end=stop, checkpoint_dir=tmp_path)
    told = []
    resumed = run(pipe, prompts, checkpoint_dir=tmp_path, observer=told.append)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    assert [event.step for event in told if event.stage == "sampling"] == [2, 3, 4, 1, 2, 3, 4]
    assert [cost.dit_block_calls for cost in pipe.costs] == [STEPS * 2 * 2] * 3
    assert [cost.time_gen > 0 for cost in pipe.costs] == [True] * 3


def test_an_interrupted_call_returns_what_there_is_and_the_next_one_goes_on(pipe, clip, tmp_path):
    options = {"motion": MotionGuidance(**MOTION), "input_video": clip}
    whole = run(pipe, **options)

    def stop(pipeline, step, _timestep, _kwargs):
        if step == 1:
            pipeline.interrupt()

    partial = run(pipe, **options, callback_on_step_end=stop, checkpoint_dir=tmp_path)
    assert not torch.equal(partial, whole)
    assert not list(tmp_path.glob("latents-*")), "latents that are not final must not be taken for it"
    assert load_state(tmp_path / STEP)[1]["step"] == 2
    assert torch.equal(run(pipe, **options, checkpoint_dir=tmp_path), whole)


def test_an_interrupt_within_a_guided_step_goes_on_from_before_that_step(pipe, clip, tmp_path):
    options = {"motion": MotionGuidance(**MOTION), "input_video": clip}
    whole, calls = run(pipe, **options), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 6:  # calls 4 to 7: the second guided step, reference first, and its gradients
            pipe.interrupt()

    hook = pipe.dit.blocks[0].register_forward_hook(stop)
    run(pipe, **options, batch_cfg=True, checkpoint_dir=tmp_path)
    hook.remove()
    assert load_state(tmp_path / STEP)[1]["step"] == 1
    assert torch.equal(run(pipe, **options, batch_cfg=True, checkpoint_dir=tmp_path),
                       run(pipe, **options, batch_cfg=True))  # fmt: skip
    assert torch.allclose(whole, run(pipe, **options, batch_cfg=True), atol=1e-4)


def test_a_finished_run_leaves_its_latents_and_a_second_call_only_decodes(pipe, tmp_path, monkeypatch):
    whole = run(pipe, output_type="np", checkpoint_dir=tmp_path)
    (left,) = (path for path in tmp_path.iterdir() if path.name != ".lock")
    assert left.name.startswith("latents-")
    monkeypatch.setattr(pipe.dit, "forward", None)
    assert np.array_equal(run(pipe, output_type="np", checkpoint_dir=tmp_path), whole)
    clear_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_runs_of_other_arguments_share_a_folder_once_one_is_done(pipe, tmp_path):
    first = run(pipe, checkpoint_dir=tmp_path)
    second = run(pipe, seed=2, checkpoint_dir=tmp_path)
    assert len(list(tmp_path.glob("latents-*"))) == 2
    assert torch.equal(run(pipe, checkpoint_dir=tmp_path), first)
    assert not torch.equal(first, second)


def test_a_seed_that_was_drawn_is_the_seed_of_the_run_that_goes_on(pipe, tmp_path):
    break_off(pipe, tmp_path, 2, seed=None)
    seed = load_state(tmp_path / INPUTS)[1]["seed"]
    assert torch.equal(run(pipe, seed=None, checkpoint_dir=tmp_path), run(pipe, seed=seed))
    assert pipe.costs[0].seed == seed


def writes_of(monkeypatch):
    names, written = [], run_state.written_whole
    monkeypatch.setattr(
        run_state, "written_whole", lambda path: (names.append(path.name.split("-")[0]), written(path))[1]
    )
    return names


@pytest.mark.parametrize(
    ("how_often", "saves"),
    [({"checkpoint_every": 2}, 2), ({"checkpoint_every": 9}, 0), ({"checkpoint_minutes": 1e-9}, 4)],
)
def test_steps_are_saved_as_often_as_asked(pipe, tmp_path, monkeypatch, how_often, saves):
    names = writes_of(monkeypatch)
    run(pipe, checkpoint_dir=tmp_path, **how_often)
    assert names == [INPUTS, *[STEP] * saves, "latents"]


# What is refused.


def test_what_differs_is_told_by_name(pipe, clip, tmp_path):
    options = {"motion": MotionGuidance(**MOTION), "input_video": clip}
    break_off(pipe, tmp_path, 2, **options)
    kept = (tmp_path / STEP).read_bytes()
    other = {
        "cfg_scale": ({"cfg_scale": 6.0}, r"cfg_scale \(saved: 5.8, now: 6.0\)"),
        "two": ({"seed": 3, "sampler": "unipc"}, r"seed \(saved: 1, now: 3\), sampler \(saved: 'euler'"),
        "motion": (
            {"motion": MotionGuidance(**{**MOTION, "window": 5})},
            r"motion.window \(saved: 3, now: 5",
        ),
        "cache": ({"cache": CacheOptions(name="first_block", threshold=0.1)}, r"cache.name \(saved: nothing"),
        "video": ({"input_video": [clip[8 - i] for i in range(9)]}, r"input_video \(saved: frames of hash"),
    }
    for changes, message in other.values():
        with pytest.raises(ValueError, match=rf"holds an unfinished run that differs in .*{message}"):
            run(pipe, **{**options, **changes}, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"differs in prompt \(saved: \['a cat'\], now: \['a dog'\]\); pass"):
        run(pipe, "a dog", **options, checkpoint_dir=tmp_path)
    assert (tmp_path / STEP).read_bytes() == kept
    assert torch.equal(
        run(pipe, "a dog", **options, checkpoint_dir=tmp_path, resume=False), run(pipe, "a dog", **options)
    )


def test_other_weights_are_refused_by_the_models_name(pipe, tiny_checkpoint, tmp_path):
    break_off(pipe, tmp_path, 2)
    other = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    with torch.no_grad():
        other.dit.blocks[0].ffn[0].weight.mul_(1.001)
    with pytest.raises(ValueError, match=r"differs in weights of dit \(saved: \w{12}, now: \w{12}\)"):
        run(other, checkpoint_dir=tmp_path)
    assert weights_fingerprint(other.vae) == weights_fingerprint(pipe.vae)
    assert weights_fingerprint(other.vae.bfloat16()) != weights_fingerprint(pipe.vae)


def test_a_long_prompt_goes_on_too(pipe, tmp_path):
    prompt = "word " * 2000
    break_off(pipe, tmp_path, 2, prompt)
    assert len(load_state(tmp_path / INPUTS)[1]["identity"]["prompt"]) < 200
    with pytest.raises(ValueError, match=r"differs in prompt \(saved: \['word .* of hash \w{12}, now"):
        run(pipe, prompt + "end", checkpoint_dir=tmp_path)


@pytest.mark.parametrize("name", [INPUTS, STEP])
def test_damaged_files_are_refused_by_name(pipe, tmp_path, name):
    break_off(pipe, tmp_path, 2)
    path = tmp_path / name
    good = path.read_bytes()
    damages = {
        "cut": good[: len(good) // 2],
        "one bit": good[:-9] + bytes([good[-9] ^ 4]) + good[-8:],
        "empty": b"",
        "lying header": (2**62).to_bytes(8, "little") + good[8:],
    }
    for content in damages.values():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is damaged or no state file"):
            run(pipe, checkpoint_dir=tmp_path)
    path.write_bytes(good)
    run(pipe, checkpoint_dir=tmp_path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be a whole number of at least 1; got 0"),
        ({"checkpoint_minutes": 0}, "checkpoint_minutes must be a finite number above 0; got 0"),
        ({"checkpoint_minutes": float("nan")}, "checkpoint_minutes must be a finite number above 0; got nan"),
    ],
)
def test_wrong_numbers_are_refused_before_any_model_runs(pipe, tmp_path, monkeypatch, wrong, message):
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    pipe.prompter.clear()
    with pytest.raises(ValueError, match=message):
        run(pipe, checkpoint_dir=tmp_path / "new", **wrong)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_model_runs(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.text_encoder, "forward", None)
    pipe.prompter.clear()
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(ValueError, match=r"checkpoint_dir .* cannot be written to: .*Errno"):
            run(pipe, checkpoint_dir=folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_cannot_use_one_folder_at_once(pipe, tmp_path):
    break_off(pipe, tmp_path, 2)
    with run_lock(tmp_path):
        for call in (run, break_off):
            arguments = (tmp_path, 1) if call is break_off else ()
            options = {} if call is break_off else {"checkpoint_dir": tmp_path}
            with pytest.raises(ValueError, match="is in use by another run"):
                call(pipe, *arguments, **options)
        with pytest.raises(ValueError, match="is in use by another run"):
            clear_checkpoints(tmp_path)
    clear_checkpoints(tmp_path)


# What cannot be written.


def test_a_full_disk_costs_one_warning_and_not_the_run(pipe, tmp_path, monkeypatch, caplog):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    whole = run(pipe)
    monkeypatch.setattr(run_state, "written_whole", full)
    assert torch.equal(run(pipe, checkpoint_dir=tmp_path, checkpoint_every=1), whole)
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "the run continues, but" in warnings[0]
    assert "inputs.safetensors is not saved: [Errno 28] No space left" in warnings[0]


def test_a_disk_that_fills_up_leaves_the_last_good_state(pipe, tmp_path, monkeypatch, caplog):
    whole, fsync, calls = run(pipe), os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 4:  # two files with their folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        break_off(pipe, tmp_path, 3, checkpoint_every=1)
    assert "step.safetensors is not saved" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", INPUTS, STEP]
    assert load_state(tmp_path / STEP)[1]["step"] == 1
    assert torch.equal(run(pipe, checkpoint_dir=tmp_path), whole)


def test_latents_that_are_not_finite_are_never_saved(pipe, tmp_path, caplog):
    def poison(_pipe, step, _timestep, kwargs):
        return {"latents": kwargs["latents"] * float("nan")} if step == 2 else None

    with pytest.raises(RuntimeError, match=r"not finite; try float32"):
        run(pipe, callback_on_step_end=poison, checkpoint_dir=tmp_path, checkpoint_every=1)
    assert "latents holds values that are not finite" in caplog.text
    assert load_state(tmp_path / STEP)[1]["step"] == 2


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_at_once_and_the_next_call_goes_on(pipe, clip, tmp_path, number):
    options = {"motion": MotionGuidance(**MOTION), "input_video": clip}
    whole, before, calls = run(pipe, **options), signal.getsignal(number), []

    def stop(*_):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), number)

    hook = pipe.dit.blocks[0].register_forward_hook(stop)
    with pytest.raises(
        RunInterrupted, match=rf"stopped by {number.name}; finished steps are in .* continues"
    ) as e:
        run(pipe, **options, checkpoint_dir=tmp_path)
    hook.remove()
    assert (e.value.signal, e.value.folder) == (number, tmp_path)
    assert isinstance(e.value, KeyboardInterrupt)
    assert len(calls) == 8
    assert signal.getsignal(number) is before
    assert load_state(tmp_path / STEP)[1]["step"] >= 1
    assert torch.equal(run(pipe, **options, checkpoint_dir=tmp_path), whole)


def test_a_signal_whose_exception_is_swallowed_stops_the_run_all_the_same(pipe, tmp_path):
    whole, seen = run(pipe), []

    def swallow(_pipe, step, _timestep, _kwargs):
        seen.append(step)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            pass

    with pytest.raises(RunInterrupted):
        run(pipe, callback_on_step_end=swallow, checkpoint_dir=tmp_path)
    assert seen == [0]
    assert torch.equal(run(pipe, checkpoint_dir=tmp_path), whole)


def test_a_signal_while_frames_are_decoded_leaves_the_final_latents(pipe, tmp_path):
    whole = run(pipe, output_type="np")
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(RunInterrupted):
        run(pipe, output_type="np", checkpoint_dir=tmp_path)
    handle.remove()
    (path,) = tmp_path.glob("latents-*")
    assert np.array_equal(decode_saved(path, pipe.vae, output_type="np"), whole)


def test_signals_are_left_alone_without_a_folder_in_threads_and_where_they_are_ignored(pipe, tmp_path):
    seen = []

    def look(*_):
        seen.append(signal.getsignal(signal.SIGTERM))

    ours = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        run(pipe, callback_on_step_end=look, num_inference_steps=1, checkpoint_dir=tmp_path)
    finally:
        signal.signal(signal.SIGTERM, ours)
    run(pipe, callback_on_step_end=look, num_inference_steps=1)
    arguments = {
        "callback_on_step_end": look,
        "num_inference_steps": 1,
        "checkpoint_dir": tmp_path,
        "seed": 5,
    }
    thread = threading.Thread(target=run, args=(pipe,), kwargs=arguments)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_IGN, ours, ours]


# Decoding later.


def test_saved_latents_decode_to_the_runs_frames_by_pipeline_or_vae(pipe, clip, tmp_path):
    frames = run(pipe, input_video=clip, mode="No_transfer", output_type="np", checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("latents-*")
    facts = read_latents(path)[1]
    assert (facts["num_frames"], facts["height"], facts["width"], facts["fps"]) == (5, 32, 32, clip.fps)
    assert facts["cost"]["dit_block_calls"] == pipe.costs[0].dit_block_calls
    assert np.array_equal(decode_saved(path, pipe, output_type="np"), frames)
    images = decode_saved(str(path), pipe.vae)
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), frames)
    assert decode_saved(path, pipe.vae, tiled=False, output_type="pt").shape == (1, 3, 5, 32, 32)


def test_latents_are_saved_before_a_decode_that_fails(pipe, tmp_path, monkeypatch):
    frames = run(pipe, output_type="np")
    with monkeypatch.context() as patch:
        for name in ("decode", "decode_chunks"):
            patch.setattr(pipe.vae, name, None)
        with pytest.raises(TypeError):
            run(pipe, output_type="np", checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("latents-*")
    assert np.array_equal(decode_saved(path, pipe, output_type="np"), frames)


def test_a_vae_that_does_not_fit_and_wrong_files_are_refused(pipe, tiny_checkpoint, tmp_path, caplog):
    break_off(pipe, tmp_path, 2)
    with pytest.raises(ValueError, match=r"step.safetensors holds no final latents, but another part"):
        decode_saved(tmp_path / STEP, pipe)
    run(pipe, checkpoint_dir=tmp_path)
    (path,) = tmp_path.glob("latents-*")
    with pytest.raises(ValueError, match="output_type must be one of pil, np, pt; got 'gif'"):
        decode_saved(path, pipe, output_type="gif")
    state, facts = load_state(path)
    save_state(tmp_path / "thin", {"latents": state["latents"][:, :4]}, facts)
    with pytest.raises(
        ValueError, match=r"thin holds latents \(1, 4, 2, 4, 4\) of 32 x 32.*VAE has 16 channels"
    ):
        decode_saved(tmp_path / "thin", pipe)
    other = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu", vae_dtype=torch.bfloat16)
    assert len(decode_saved(path, other.vae)) == 5
    assert "was made with a VAE of other weights or another type" in caplog.text
