"""The evaluation of motion transfer, on a tiny random checkpoint: what is run, kept, summed up and shown."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.contact_sheet import contact_sheet, load_strip, save_strip
from benchmarks.quality.methods import (
    Method,
    at_equal_cost,
    guided,
    released_for,
    standard_methods,
)
from benchmarks.quality.pairs import (
    Row,
    append_row,
    evaluate,
    make_pairs,
    missing_jobs,
    read_rows,
    run_pair,
    strip_name,
)
from benchmarks.quality.report import (
    as_json,
    best_method,
    cost_figure,
    markdown_table,
    summarise,
)
from benchmarks.synthetic.clips import (
    COLOURS,
    HELD_OUT_SHAPES,
    HELD_OUT_TRAJECTORIES,
    SHAPES,
    TRAJECTORIES,
)
from diffsynth import WanVideoPipeline
from diffsynth.configs.defaults import RunDefaults
from diffsynth.motion import MotionGuidance
from diffsynth.planning.cost import guidance_cost

ROOT = Path(__file__).parent.parent
QUICK = RunDefaults(
    options={"num_inference_steps": 2, "cfg_scale": 1.0},
    motion={"effi_AMF": {"guided_steps": 1, "inner_steps": 2, "interval": 2}},
)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    pipe = WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    pipe.defaults = QUICK
    return pipe


@pytest.fixture(scope="module")
def pair():
    return make_pairs(1, num_frames=5)[0]


@pytest.fixture(scope="module")
def methods(pipe):
    return {method.name: method for method in standard_methods(pipe)}


def test_prompts_name_other_things_than_their_references_show():
    for split in ("test", "tune"):
        pairs = make_pairs(32, split, num_frames=2)
        for pair in pairs:
            own, ground = pair.clip.objects[-1], pair.clip.background[1]
            assert len(pair.clip.objects) == 1
            assert pair.shape in SHAPES
            assert pair.shape != own.shape
            assert {pair.colour, pair.background} <= COLOURS.keys() - {own.colour, ground}
            assert np.linalg.norm(np.subtract(COLOURS[pair.colour], COLOURS[pair.background])) > 120
            assert f"{pair.colour} {pair.shape} on a" in pair.prompt
            assert pair.prompt.endswith(f"{pair.background} background")
        assert len({pair.prompt for pair in pairs}) > 24


def test_half_of_the_test_references_and_none_to_tune_on_are_held_out():
    kinds = {True: (HELD_OUT_SHAPES, HELD_OUT_TRAJECTORIES), False: (SHAPES, TRAJECTORIES)}
    for split, share in (("test", 16), ("tune", 0)):
        pairs = make_pairs(32, split, num_frames=2)
        assert sum(pair.held_out for pair in pairs) == share
        for pair in pairs:
            own = pair.clip.objects[-1]
            assert own.shape in kinds[pair.held_out][0]
            assert own.trajectory in kinds[pair.held_out][1]


def test_a_quarter_of_the_references_has_a_variation_of_each_kind_held_out_or_not():
    pairs = make_pairs(32, num_frames=2)
    varied = [(pair.variation, pair.held_out) for pair in pairs if pair.variation != "plain"]
    assert sorted(varied) == [
        (name, held) for name in ("checkered", "growth", "shaded", "spin") for held in (False, True)
    ]
    assert {pair.clip.background[0] for pair in pairs if pair.variation == "checkered"} == {"checkered"}
    assert {pair.clip.background[0] for pair in pairs if pair.variation == "plain"} == {"plain"}


def test_a_pair_is_the_same_for_any_count_and_differs_between_splits():
    few, many = make_pairs(3, num_frames=2), make_pairs(9, num_frames=2)
    assert [pair.prompt for pair in few] == [pair.prompt for pair in many[:3]]
    assert np.array_equal(few[2].clip.frames, many[2].clip.frames)
    assert not np.array_equal(few[0].clip.frames, make_pairs(1, "tune", num_frames=2)[0].clip.frames)
    with pytest.raises(ValueError, match="split must be one of test, tune; got 'train'"):
        make_pairs(1, "train")


def test_the_standard_methods_are_named_and_take_the_checkpoints_numbers(methods):
    assert list(methods) == [
        "VAE_floor", "No_transfer", "video-to-video 0.7", "video-to-video 0.8", "video-to-video 0.9", "AMF",
        "effi_AMF", "effi_AMF released()", "FlowMotion", "FlowMotion at equal FFE",
    ]  # fmt: skip
    assert methods["effi_AMF"].motion == MotionGuidance(guided_steps=1, inner_steps=2, interval=2)
    assert methods["AMF"].motion == replace(methods["effi_AMF"].motion, mode="AMF")
    assert methods["FlowMotion"].motion == MotionGuidance.for_mode("FlowMotion")
    assert methods["No_transfer"].motion is None


def test_released_numbers_change_only_where_the_released_code_could_not_run():
    assert released_for((30, 52)) == MotionGuidance.released(block=None)
    small = released_for((8, 8))
    assert small == MotionGuidance.released(block=None, tile=(2, 4), window=15)


def test_costs_are_counted_in_forwards():
    flow = MotionGuidance(block=4, guided_steps=12, inner_steps=10, interval=3)
    assert guidance_cost(flow, 6, 25) == pytest.approx(12 * (1 + 3 * 4) * 4 / 6)
    assert guidance_cost(flow, 6, 5) == pytest.approx(5 * (1 + 3 * 4) * 4 / 6)
    assert guidance_cost(flow, 6, 25, gradient_evaluations=20) == pytest.approx((12 + 60) * 4 / 6)
    prediction = MotionGuidance.for_mode("FlowMotion", {"guided_steps": 10})
    assert guidance_cost(prediction, 30, 50) == 10 * (1 + 3 * 2)
    equal = at_equal_cost(prediction, flow, 6, 25)
    assert (equal.guided_steps, equal.inner_steps) == (12, 4)
    assert guidance_cost(equal, 6, 25) == pytest.approx(guidance_cost(flow, 6, 25), rel=0.1)


def test_a_second_call_makes_no_run_again_and_adds_no_row(pipe, pair, methods, tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    two = [methods["No_transfer"], methods["effi_AMF"]]
    rows = evaluate(pipe, [pair], two[:1], [0], path)
    rows = evaluate(pipe, [pair], two, [0], path, tmp_path / "videos")
    text = path.read_text()
    assert [row.method for row in rows] == ["No_transfer", "effi_AMF"]
    assert evaluate(pipe, [pair], two, [0], path) == rows
    assert path.read_text() == text
    free, moved = rows
    assert (free.gradient_evaluations, moved.gradient_evaluations) == (0, 1)
    assert (free.forward_equivalents, moved.forward_equivalents) == (2, 2 + (1 + 3) / 2)
    assert moved.seconds > moved.denoising_seconds > moved.guidance_seconds > 0 == free.guidance_seconds
    assert 0 < moved.trajectory_error < 64
    assert moved.error is None
    strip = tmp_path / "videos" / strip_name(pair, "effi_AMF", 0)
    assert strip.name == "test_000_effi_AMF_0.png"
    assert load_strip(strip, 5).shape == (5, 64, 64, 3)
    assert [job.seed for job in missing_jobs(pipe, [pair], two, [0, 1], path)] == [1, 1]


def test_runs_differ_between_seeds_and_repeat_with_the_same(pipe, pair, methods):
    one, again, other = (run_pair(pipe, pair, methods["No_transfer"], seed) for seed in (0, 0, 1))
    assert one.trajectory_error == again.trajectory_error != other.trajectory_error


def test_the_floor_is_the_tracked_reconstruction_and_is_made_once(pipe, pair, methods, tmp_path, monkeypatch):
    monkeypatch.setattr(pipe.vae, "encode", lambda video: video)
    monkeypatch.setattr(pipe.vae, "decode", lambda latents, num_frames: latents[:, :, :num_frames])
    rows = evaluate(pipe, [pair], [methods["VAE_floor"]], [0, 1], tmp_path / "rows.jsonl")
    assert len(rows) == 1
    assert rows[0].trajectory_error < 0.35
    assert rows[0].velocity_cosine > 0.99
    assert rows[0].shape_right is None


def test_a_failed_run_is_a_row_with_its_error(pipe, pair, tmp_path):
    bad = guided("block 7", MotionGuidance(block=7))
    rows = evaluate(pipe, [pair], [bad], [0], tmp_path / "rows.jsonl")
    assert rows[0].error == "ValueError: block must be in 0..1 for this DiT; got 7"
    assert rows[0].trajectory_error is None
    summary = summarise(rows)
    assert summary["block 7"].errors == {rows[0].error: 1}
    assert f"- block 7: 1 failed: {rows[0].error}" in markdown_table(summary)


def test_rows_of_other_settings_are_not_mixed_in(pipe, pair, tmp_path):
    path = tmp_path / "rows.jsonl"
    append_row(row("No_transfer", 0, 0, 1.0), path)
    with pytest.raises(ValueError, match="has rows of 'No_transfer' that were made with other settings"):
        missing_jobs(pipe, [pair], [Method(name="No_transfer", takes_reference=False)], [0], path)


def test_half_a_line_of_a_killed_run_is_cut_off_and_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    append_row(row("AMF", 0, 0, 1.0), path)
    whole = path.read_text()
    path.write_text(whole + whole[:30])
    assert read_rows(path) == [row("AMF", 0, 0, 1.0)]
    assert path.read_text() == whole
    path.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="line 1, is no row of this evaluation"):
        read_rows(path)


def row(method, pair, seed, path_error, **more):
    return Row(
        split="test", pair=pair, method=method, seed=seed, held_out=False, variation="plain", settings="{}",
        trajectory_error=path_error, **more,
    )  # fmt: skip


def test_summaries_are_means_over_runs_and_ratios_over_the_same_pairs():
    rows = [
        row("No_transfer", pair, seed, 10.0 + pair, colour_right=1.0) for pair in range(8) for seed in (0, 1)
    ]
    rows += [
        row("AMF", pair, seed, 0.3 * (10 + pair), colour_right=float(pair > 1))
        for pair in range(8)
        for seed in (0, 1)
    ]
    rows.append(row("AMF", 9, 0, None, error="ValueError: no"))
    summary = summarise(rows)
    amf = summary["AMF"]
    assert (amf.runs, amf.means["trajectory_error"].value) == (17, pytest.approx(0.3 * 13.5))
    ratio = amf.ratios["trajectory_error"]
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.3, 0.3, 0.3))
    assert amf.differences["colour_right"].value == pytest.approx(-0.25)
    assert amf.differences["colour_right"].low < -0.25 < amf.differences["colour_right"].high <= 0
    assert "flow_error" not in amf.means
    assert best_method(summary, ("No_transfer", "AMF", "none")) == "AMF"
    assert best_method(summary, ("none",)) is None
    table = markdown_table(summary)
    assert "| method | runs | path error / No_transfer | path error px | colour right |\n" in table
    assert "| AMF | 17 | 0.30 | 4.05 [" in table
    assert "| 0.75 [0.38, 1.00] |" in table
    assert table.endswith("- AMF: 1 failed: ValueError: no\n")
    assert (
        json.loads(json.dumps(as_json(summary)))["AMF"]["ratios"]["trajectory_error"]["value"] == ratio.value
    )
    with pytest.raises(ValueError, match="there are no rows to summarise"):
        summarise([])


def test_one_pair_has_no_interval_in_table_and_json():
    summary = summarise([row("AMF", 0, 0, 4.0)])
    assert "| AMF | 1 |  | 4.00 |" in markdown_table(summary)
    assert as_json(summary)["AMF"]["means"]["trajectory_error"] == {"value": 4.0, "low": None, "high": None}


def test_the_figure_of_cost_has_the_methods_whose_cost_is_known():
    both = [row("AMF", 0, 0, 4.0, forward_equivalents=206.0), row("floor", 0, 0, 9.0)]
    legend = cost_figure(summarise(both)).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["beaten by none", "1  AMF"]
    assert cost_figure(summarise(both[1:])) is None


def test_a_strip_keeps_every_pixel(pair, tmp_path):
    path = save_strip(pair.clip.frames, tmp_path / "a" / "strip.png")
    assert np.array_equal(load_strip(path, 5), pair.clip.frames)
    with pytest.raises(ValueError, match="320 pixels wide, which is not 3 frames"):
        load_strip(path, 3)


def test_the_sheet_shows_the_first_and_last_frames_of_every_video(pair):
    frames = pair.clip.frames
    sheet = np.asarray(contact_sheet([[frames, frames[::-1]]] * 2, ["one", "two"], ("a", "b"), num_shown=2))
    large = frames.repeat(2, axis=1).repeat(2, axis=2)
    places = [
        next(
            (top, left)
            for top in range(sheet.shape[0] - 127)
            for left in range(sheet.shape[1] - 127)
            if np.array_equal(sheet[top, left : left + 128], frame[0])
            and np.array_equal(sheet[top : top + 128, left : left + 128], frame)
        )
        for frame in (large[0], large[-1])
    ]
    assert places[0][0] == places[1][0]
    assert places[0][1] < places[1][1]
    for bad, message in (([], "as many, and some; got 0"), ([[frames]], "must have 2, as titles; got")):
        with pytest.raises(ValueError, match=message):
            contact_sheet(bad, ["one"] * len(bad), ("a", "b"))


@pytest.mark.slow
def test_the_script_writes_rows_table_summary_and_sheet(tiny_checkpoint, tmp_path):
    checkpoint, results = tmp_path / "quick", tmp_path / "results"
    shutil.copytree(tiny_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["fastvmt"] = {"num_inference_steps": 2, "cfg_scale": 1, "num_frames": 5}
    (checkpoint / "config.json").write_text(json.dumps(config))
    names = ("No_transfer", "video-to-video 0.7")
    command = [
        sys.executable, "-m", "benchmarks.quality", "--model_dir", str(checkpoint), "--pairs", "1",
        "--seeds", "1", "--methods", ",".join(names), "--output_dir", str(results), "--workers", "1",
        "--sheet_method", names[1], "--device", "cpu",
    ]  # fmt: skip
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "2/2 pair 0, video-to-video 0.7, seed 0: path error" in shown
    assert tuple(row.method for row in read_rows(results / "rows.jsonl")) == names
    assert "Against video-to-video 0.7, the best video-to-video" in (results / "table.md").read_text()
    summary = json.loads((results / "summary.json").read_text())["All references"]
    assert summary["No_transfer"]["video-to-video 0.7"]["ratios"]["trajectory_error"]["value"] > 0
    assert (results / "sheet.png").is_file()
