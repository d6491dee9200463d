"""What a checkpoint declares about its runs, and who reads it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffsynth import WanVideoPipeline
from diffsynth.configs.caches import choose_cache
from diffsynth.configs.defaults import PUBLISHED_PRESETS, RunDefaults, run_defaults
from diffsynth.configs.descriptors import DESCRIPTORS
from diffsynth.configs.resolve import ReferenceFacts, motion_for, resolve, unknown_words
from diffsynth.motion import MotionGuidance
from diffsynth.prompters.tokenizer import find_tokenizer, load_tokenizer
from diffsynth.testing import write_checkpoint

ROOT = Path(__file__).parent.parent
SECTION = {
    "num_inference_steps": 2,
    "cfg_scale": 1.0,
    "height": 32,
    "width": 48,
    "num_frames": 5,
    "denoising_strength": 0.9,
    "motion": {"effi_AMF": {"block": 1, "tau": 4.0, "lr": [0.01, 0.005], "guided_steps": 1}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return declare(write_checkpoint(tmp_path_factory.mktemp("declared") / "model"), SECTION)


def declare(folder, section):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "fastvmt": section}))
    return folder


def test_for_checkpoint_reads_what_the_checkpoint_declares(checkpoint):
    guidance = motion_for(checkpoint)
    assert guidance == MotionGuidance(block=1, tau=4.0, lr=(0.01, 0.005), guided_steps=1)
    assert motion_for(checkpoint, tau=2.0).tau == 2.0
    assert motion_for(checkpoint, mode="AMF") == MotionGuidance(mode="AMF")
    flow_motion = motion_for(checkpoint, mode="FlowMotion")
    assert flow_motion == MotionGuidance.for_mode("FlowMotion")


def test_a_call_takes_what_the_checkpoint_declares(checkpoint):
    pipe = WanVideoPipeline.from_pretrained(checkpoint, device="cpu")
    steps = []

    def note_step(_pipe, step, _timestep, _latents):
        steps.append(step)

    frames = pipe("a cat", seed=1, callback_on_step_end=note_step)
    assert (len(frames), frames[0].size, steps) == (5, (48, 32), [0, 1])
    long = [frames[0]] * 9
    assert len(pipe("a cat", input_video=long, seed=1)) == 5
    # What the caller says goes first.
    assert len(pipe("a cat", input_video=long, num_frames=9, height=16, width=16, seed=1)) == 9


def test_a_checkpoint_that_declares_nothing_has_the_published_defaults(tmp_path):
    folder = write_checkpoint(tmp_path / "plain")
    assert run_defaults(folder) == RunDefaults()
    assert motion_for(folder) == MotionGuidance()
    assert run_defaults(tmp_path) == RunDefaults()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"steps": 3}, "'fastvmt' may hold .*cfg_scale.*steps"),
        ([1], "'fastvmt' may hold"),
        ({"motion": {"AMF": 3}}, "motion must map modes to numbers"),
        ({"presets": {"fast": 3}}, "presets must map names to other fields"),
        ({"presets": {"fast": {"presets": {}, "steps": 1}}}, "presets must map names to other fields"),
        ({"presets": {"fast": {"motion": {"AMF": 1}}}}, "'fast': motion must map modes"),
        ({"words": "a red"}, "words must be a list of texts"),
    ],
)
def test_a_section_that_cannot_be_read_is_refused(tmp_path, section, message):
    (tmp_path / "config.json").write_text(json.dumps({"fastvmt": section}))
    with pytest.raises(ValueError, match=message):
        run_defaults(tmp_path)


@pytest.mark.parametrize("name", ["Wan2.1-T2V-nano", "Wan2.2-TI2V-nano"])
def test_an_embedded_model_declares_the_words_of_its_tokenizer(name):
    folder = ROOT / "models" / name
    tokenizer = load_tokenizer(find_tokenizer(folder))
    words = run_defaults(folder).words
    ids = [tokenizer.pieces(word) for word in words]
    assert sorted(ids) == [[id] for id in range(4, tokenizer.vocab_size)]  # after four special ones
    assert tokenizer.pieces("corgi") == [3]


def test_words_that_a_model_does_not_know_are_named():
    words = ("a", "red", "star")
    told = unknown_words(["A corgi, surfing!", "a RED star surfing"], words)
    assert told == "the model knows 3 words; ignored: corgi, surfing; it knows: a, red, star"
    assert unknown_words(["a red star."], words) is None
    assert unknown_words(["a corgi"], None) is None
    many = unknown_words([" ".join(f"w{i}" for i in range(20))], words)
    assert "w11, ...; it knows" in many


def test_a_call_names_them_in_one_warning(tmp_path, caplog):
    folder = declare(write_checkpoint(tmp_path / "few"), {"words": ["a", "cat"]})
    pipe = WanVideoPipeline.from_pretrained(folder, device="cpu")
    size = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 1}
    pipe(["a dog", "a cat"], **size)
    assert [r.message for r in caplog.records if "knows" in r.message] == [
        "the model knows 2 words; ignored: dog; it knows: a, cat"
    ]


def test_a_preset_changes_what_it_names_and_no_more():
    defaults = RunDefaults(
        options={"cfg_scale": 3.0},
        motion={"effi_AMF": {"block": 4, "tau": 2.0}},
        presets={"quick": {"sampler": "unipc", "motion": {"effi_AMF": {"tau": 1.0}, "AMF": {"sf": 2}}}},
    )
    quick = defaults.with_preset("quick")
    assert quick.motion == {"effi_AMF": {"block": 4, "tau": 1.0}, "AMF": {"sf": 2}}
    assert (quick["sampler"], quick["cfg_scale"]) == ("unipc", 3.0)
    assert defaults.with_preset("exact") is defaults
    with pytest.raises(ValueError, match="preset must be one of exact, quick; got 'fast'"):
        defaults.with_preset("fast")


@pytest.mark.parametrize("preset", PUBLISHED_PRESETS)
@pytest.mark.parametrize("mode", DESCRIPTORS)
def test_published_presets_name_what_exists(preset, mode):
    chosen = RunDefaults().with_preset(preset)
    numbers = chosen.motion.get(mode, {})
    assert MotionGuidance.for_mode(mode, numbers).guided_steps <= chosen["num_inference_steps"] // 4
    for dim in (1536, 5120):
        assert choose_cache(chosen["cache"], chosen["cache_threshold"], dim).name == "magcache"


def test_a_declared_preset_is_a_call_s_defaults_and_what_is_given_goes_first(checkpoint, caplog):
    pipe = WanVideoPipeline.from_pretrained(checkpoint, device="cpu")
    pipe.defaults = replace(pipe.defaults, presets={"one": {"num_inference_steps": 1, "cache": "magcache"}})
    steps = []
    pipe("a", seed=1, preset="one", observer=steps.append, output_type="latent")
    assert [event.steps for event in steps if event.stage == "sampling" and event.step] == [1]
    assert "no step cache: no MagCache ratios are known for a DiT of width" in caplog.text
    steps.clear()
    pipe("a", seed=1, preset="one", num_inference_steps=2, observer=steps.append, output_type="latent")
    assert [event.steps for event in steps if event.stage == "sampling" and event.step] == [2, 2]


def test_numbers_of_motion_are_checked():
    with pytest.raises(ValueError, match="motion has no field speed"):
        MotionGuidance.for_mode("AMF", {"speed": 3})
    with pytest.raises(ValueError, match="tau must be a finite number above 0"):
        MotionGuidance.for_mode("AMF", {"tau": -1})


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        run_defaults(tmp_path)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("Wan2.2-TI2V-5B", (704, 1280, 121, 24.0, 50, 5.0, 5.0, None)),
        ("Wan2.2-T2V-A14B", (480, 832, 81, 16.0, 40, 12.0, 4.0, 3.0)),
        ("Wan2.2-I2V-A14B", (480, 832, 81, 16.0, 40, 5.0, 3.5, 3.5)),
        ("Wan2.1-I2V-14B-480P", (480, 832, 81, 16.0, 40, 3.0, 5.0, None)),
        ("Wan2.1-I2V-14B-720P", (720, 1280, 81, 16.0, 40, 5.0, 5.0, None)),
        ("Wan2.1-FLF2V-14B-720P", (720, 1280, 81, 16.0, 50, 16.0, 5.0, None)),
        ("Wan2.1-T2V-1.3B", (480, 832, 81, 15.0, 50, 7.0, 5.8, None)),
    ],
)
def test_published_folders_run_as_they_were_published(tmp_path, folder, expected):
    names = ("height", "width", "num_frames", "fps", "num_inference_steps", "sigma_shift", "cfg_scale")
    (tmp_path / folder).mkdir()
    defaults = run_defaults(tmp_path / folder)
    assert tuple(defaults[name] for name in (*names, "low_noise_cfg_scale")) == expected
    assert defaults["boundary"] == (0.9 if folder == "Wan2.2-I2V-A14B" else 0.875)
    assert defaults["negative_prompt"].startswith("oversaturated")
    ranged = folder in ("Wan2.2-T2V-A14B", "Wan2.1-FLF2V-14B-720P")  # whose first steps are above all motion
    assert ("effi_AMF" in defaults.motion) == ranged
    if ranged:
        reference = ReferenceFacts(num_frames=81, height=480, width=832)
        run = resolve({"seed": 1}, defaults, reference)
        guided = [run.levels[step] for step in run.guided]
        assert len(guided) == (12 if "FLF2V" in folder else 10)
        assert 0.955 >= guided[0] > guided[-1] >= 0.913


def test_levels_that_are_passed_decide_the_steps_and_where_guidance_is(tmp_path):
    reference = ReferenceFacts(num_frames=17, height=64, width=64)
    given = {"seed": 1, "sigmas": [1.0, 0.94, 0.92, 0.5], "motion": {"guided": (0.955, 0.913)}}
    run = resolve(given, run_defaults(tmp_path), reference)
    assert (run.num_inference_steps, run.sigmas, run.guided) == (4, (1.0, 0.94, 0.92, 0.5), range(1, 3))
    (tmp_path / "config.json").write_text('{"fastvmt": {"sigmas": [1.0, 0.75]}}')
    declared = run_defaults(tmp_path)
    assert resolve({"seed": 1}, declared, None).num_inference_steps == 2
    assert resolve({"seed": 1, "num_inference_steps": 9}, declared, None).sigmas is None
