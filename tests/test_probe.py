"""The motion probe: true flow is exact, agreement the textbook's, attention is read as guidance reads it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.probe import measure as probe
from benchmarks.probe.measure import block_features, natural_size, probe_motion, read_displacements
from benchmarks.probe.report import ProbeResult, suggest
from benchmarks.probe.truth import TrueFlow, agreement, moments, moments_by_distance, true_flow
from benchmarks.synthetic.clips import SceneObject, SceneOptions, SyntheticClip, make_clip
from diffsynth import WanVideoPipeline
from diffsynth.configs.defaults import RunDefaults
from diffsynth.motion import MotionGuidance, attention_motion_flow, frame_pairs

ROOT = Path(__file__).parent.parent
SMALL = {"clips": 4, "height": 64, "width": 64, "num_frames": 13, "sigmas": (0.9, 0.5), "taus": (1, 4)}
# The tiny checkpoint's tokens are 16 pixels wide.
TINY = {"clips": 1, "height": 32, "width": 32}


def moving_square(velocity, *, top_left=(16, 16), side=16, num_frames=17, size=64, camera=(0, 0)):
    """A square that moves by `velocity` pixels a frame before a background that moves by `camera`."""
    layers = np.zeros((2, num_frames, 2, 3))
    layers[..., :2] = np.eye(2)
    times = np.arange(num_frames)[:, None]
    layers[0, :, :, 2], layers[1, :, :, 2] = times * camera, np.array(top_left) + times * velocity
    places = np.stack(np.mgrid[:size, :size], axis=-1) + 0.5 - layers[1, :, None, None, :, 2]
    return SyntheticClip(
        frames=np.zeros((num_frames, size, size, 3), np.uint8),
        caption="",
        objects=(SceneObject(shape="square", colour="red", texture="plain", trajectory="line", radius=0.1),),
        background=("plain", "blue"),
        masks=((places >= 0) & (places < side)).all(-1)[None],
        centroids=layers[1:, :, :, 2].astype(np.float32),
        layers=layers,
    )


@pytest.mark.parametrize("tokens", [(0, 0), (1, 0), (1, -1), (-0.5, 1.5)])
def test_what_moves_by_n_tokens_a_latent_frame_has_a_true_flow_of_n(tokens):
    """8 pixels make a token, 4 frames a latent frame; the first frame is one by itself."""
    truth = true_flow(moving_square(2 * np.array(tokens), top_left=(24, 24)), token_size=(8, 8), sf=3)
    assert truth.pairs == [(0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    for (i, j), flow, counted in zip(truth.pairs, truth.flow, truth.counted, strict=True):
        assert counted.any() or i > 1
        frames = 4 * (j - i) - (1.5 if i == 0 else 0)
        expected = np.broadcast_to(np.array(tokens) * frames / 4, flow[counted].shape)
        np.testing.assert_allclose(flow[counted], expected, atol=1e-6)
        assert not flow[~counted].any()


def test_a_token_counts_if_half_of_its_pixels_are_the_objects():
    counted = true_flow(moving_square((0, 0), top_left=(16, 20)), token_size=(8, 8)).counted[0]
    assert np.argwhere(counted).tolist() == [[row, col] for row in (2, 3) for col in (2, 3, 4)]
    counted = true_flow(moving_square((0, 0), top_left=(16, 21)), token_size=(8, 8)).counted[0]
    assert np.argwhere(counted).tolist() == [[row, col] for row in (2, 3) for col in (3, 4)]


def test_tokens_that_end_outside_of_the_picture_do_not_count():
    truth = true_flow(moving_square((0, 4), top_left=(16, 40)), token_size=(8, 8))
    # Of columns 5 and 6 of 0..7, after 2.5 frames and after 6.5.
    assert [np.argwhere(c)[:, 1].tolist() for c in truth.counted[:2]] == [[5, 6, 5, 6], []]


def test_the_background_counts_on_demand_and_moves_with_the_camera():
    clip = moving_square((2, 0), top_left=(16, 16), camera=(0, 2))
    truth = true_flow(clip, token_size=(8, 8), tokens="all")
    pair = truth.pairs.index((1, 2))
    assert truth.counted[pair].sum() > true_flow(clip, token_size=(8, 8)).counted[pair].sum() > 0
    np.testing.assert_allclose(truth.flow[pair][0, 0], (0, 1), atol=1e-6)
    # The square stands at row 20 in the middle frame, 3 of 1 to 4, and covers 22 to 37.
    np.testing.assert_allclose(truth.flow[pair][3, 2], (1, 0), atol=1e-6)


def test_true_flow_of_a_drawn_clip_follows_its_centroid():
    clip = make_clip(
        5, trajectory="line", options=SceneOptions(spin=0, still=0, camera=0, second_object=0, growth=0)
    )
    truth = true_flow(clip, token_size=(8, 8))
    pair = truth.pairs.index((1, 4))
    way = (clip.centroids[0, 13:17].mean(0) - clip.centroids[0, 1:5].mean(0)) / 8
    np.testing.assert_allclose(truth.flow[pair][truth.counted[pair]].mean(0), way, atol=1e-4)


def pooled(true, read, blind, distances=None):
    distances = np.zeros(len(true), int) if distances is None else distances
    return agreement(
        np.stack([moments(true[at], read[at], blind[at]) for at in (distances == d for d in set(distances))])
    )


def test_a_perfect_reading_has_correlation_and_slope_1():
    rng = np.random.default_rng(0)
    true, blind = rng.normal(size=(2, 50, 2))
    found = pooled(true, true, blind)
    for values in (found.correlation, found.slope, found.partial_correlation, found.partial_slope):
        assert values == pytest.approx(1, abs=1e-9)
    found = pooled(true, 2 - 0.25 * true, blind)
    assert (found.correlation, found.slope) == (pytest.approx(-1), pytest.approx(-0.25))


def test_agreement_is_the_textbooks():
    rng = np.random.default_rng(1)
    true, blind, noise = rng.normal(size=(3, 200, 2))
    true = true + blind
    read = 0.5 * true + 0.8 * blind + noise
    distances = np.arange(200) % 3
    found = pooled(true, read, blind, distances)
    x, y, p, d = (v.ravel() for v in (true, read, blind, distances.repeat(2)))
    assert found.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.slope == pytest.approx(np.polyfit(x, y, 1)[0])
    left = [
        np.concatenate(
            [v[d == k] - np.polyval(np.polyfit(p[d == k], v[d == k], 1), p[d == k]) for k in range(3)]
        )
        for v in (x, y)
    ]
    assert found.partial_correlation == pytest.approx(np.corrcoef(*left)[0, 1])
    assert found.partial_slope == pytest.approx(np.polyfit(*left, 1)[0])


def test_a_blind_reading_of_inward_motion_correlates_but_not_partially():
    rng = np.random.default_rng(2)
    blind, noise = rng.normal(size=(2, 300, 2))
    found = pooled(blind + noise, 0.9 * blind + 0.3, blind)
    assert found.correlation > 0.6
    assert (found.partial_correlation, found.partial_slope) == pytest.approx((0, 0), abs=1e-9)
    half = pooled(blind + noise, 0.5 * (blind + noise) + 0.5 * blind, blind)
    assert (half.partial_correlation, half.partial_slope) == (pytest.approx(1), pytest.approx(0.5))


def test_pooling_pieces_is_pooling_all_and_a_constant_reading_has_no_correlation():
    true, read, blind = np.random.default_rng(3).normal(size=(3, 40, 2))
    pieces = sum(moments(true[at], read[at], blind[at]) for at in (slice(0, 7), slice(7, 40)))
    np.testing.assert_allclose(pieces, moments(true, read, blind))
    assert pooled(true, np.full_like(true, 0.1), blind).correlation == 0
    with pytest.raises(ValueError, match="the clips have no motion to compare with"):
        pooled(np.ones_like(true), read, blind)
    with pytest.raises(ValueError, match="no tokens, or all move alike"):
        agreement(np.zeros((1, 4, 4)))


def random_qk(frames=3, rows=4, cols=5, heads=3, width=8):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(frames, rows, cols, heads, width, generator=generator) for _ in range(2))


def some_truth(frames=3, rows=4, cols=5, sf=3, flow=None):
    pairs = [(i, j) for i, j in frame_pairs(frames, sf) if i != j]
    counted = np.random.default_rng(0).random((len(pairs), rows, cols)) < 0.6
    flow = np.zeros((len(pairs), rows, cols, 2)) if flow is None else flow
    return TrueFlow(pairs=pairs, flow=flow.astype(np.float32), counted=counted)


@pytest.mark.parametrize("attention_bytes", [2**20, 1])
def test_displacements_are_those_that_guidance_reads(monkeypatch, attention_bytes):
    monkeypatch.setattr(probe, "ATTENTION_BYTES", attention_bytes)
    (q, k), truth, taus = random_qk(), some_truth(), (0.5, 3.0)
    read = read_displacements(q, k, truth, taus)
    for r, heads in enumerate([[0], [1], [2], "mean_qk", "mean_logits"]):
        for t, tau in enumerate(taus):
            flow = attention_motion_flow(q, k, pairs=truth.pairs, tau=tau, heads=heads)
            torch.testing.assert_close(
                read[r, t], flow[torch.from_numpy(truth.counted)], atol=1e-5, rtol=1e-5
            )


def test_features_that_move_by_whole_tokens_are_read_with_correlation_and_slope_1():
    first = torch.randn(8, 8, 2, 64, generator=torch.Generator().manual_seed(0))
    shift = np.array([1, -2])
    q = torch.stack([first.roll(tuple(shift * t), (0, 1)) for t in range(3)])
    pairs = [(0, 1), (0, 2), (1, 2)]
    flow = np.stack([np.broadcast_to((j - i) * shift, (8, 8, 2)) for i, j in pairs]).astype(np.float32)
    counted = np.zeros((3, 8, 8), bool)
    counted[:, 2:6, 4:6] = True
    truth = TrueFlow(pairs=pairs, flow=flow, counted=counted)
    read = read_displacements(q, q, truth, (20.0,)).numpy()
    found = agreement(moments_by_distance(truth, read, sf=4))
    for values in (found.correlation, found.slope, found.partial_correlation, found.partial_slope):
        np.testing.assert_allclose(values, np.ones((4, 1)), atol=1e-4)
    blind = read_displacements(torch.zeros_like(q), q, truth, (1.0,)).numpy()
    found = agreement(moments_by_distance(truth, blind, sf=4))
    np.testing.assert_allclose(found.partial_correlation, np.zeros((4, 1)), atol=1e-4)


@pytest.fixture(scope="module")
def pipe(tiny_checkpoint):
    return WanVideoPipeline.from_pretrained(tiny_checkpoint, device="cpu")


@pytest.fixture(scope="module")
def result(pipe):
    return probe_motion(pipe, **SMALL)


@torch.no_grad()
def test_one_run_of_the_dit_gives_the_features_of_each_block(pipe):
    latents = torch.randn(1, pipe.dit.in_dim, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    timestep, context = torch.tensor([600.0]), torch.ones(1, 3, pipe.dit.text_dim)
    for blocks in ([0, 1], [1]):
        walked = list(block_features(pipe.dit, latents, timestep, context, blocks))
        assert len(walked) == len(blocks)
        for block, found in zip(blocks, walked, strict=True):
            for x, expected in zip(found, pipe.dit.features(latents, timestep, context, block), strict=True):
                torch.testing.assert_close(x, expected[0], atol=0, rtol=0)


def test_a_random_checkpoint_is_probed_to_finite_numbers(pipe, result):
    assert result.correlation.shape == (2, 4, 2, 2)
    assert (result.blocks, result.readings) == ((0, 1), (0, 1, "mean_qk", "mean_logits"))
    assert (result.sigmas, result.taus, result.size) == ((0.9, 0.5), (1.0, 4.0), (13, 64, 64))
    for values in (result.correlation, result.slope, result.partial_correlation, result.partial_slope):
        assert np.isfinite(values).all()
        assert values.std() > 0
    assert abs(result.correlation).max() <= 1
    assert abs(result.partial_correlation).max() <= 1
    assert result.num_samples >= 10
    again = probe_motion(pipe, **{**SMALL, "blocks": [1], "sigmas": (0.9,)})
    np.testing.assert_allclose(again.correlation[0, :, 0], result.correlation[1, :, 0], atol=1e-6)


@pytest.mark.slow
def test_the_caption_the_seed_and_the_tokens_make_a_difference(pipe, result):
    small = {**SMALL, "sigmas": (0.9,), "taus": (1,)}
    for change in ({"prompt": "caption"}, {"seed": 1}, {"tokens": "all", "scenes": SceneOptions(camera=1)}):
        other = probe_motion(pipe, **{**small, **change})
        assert abs(other.correlation[1, :, 0, 0] - result.correlation[1, :, 0, 0]).min() > 1e-6


def test_given_clips_are_those_that_count_and_seeing_nothing_is_reported(pipe):
    clips = [moving_square((2, 2), top_left=(0, 0), num_frames=9), moving_square((0, -2), num_frames=9)]
    found = probe_motion(pipe, clips=clips, sigmas=(0.5,), taus=(1,), blocks=(0,), sf=8)
    truths = [true_flow(clip, token_size=(16, 16), sf=8) for clip in clips]
    true, blind = (
        np.concatenate([getattr(t, name)[t.counted] for t in truths]).ravel() for name in ("flow", "blind")
    )
    assert found.blind == pytest.approx(np.corrcoef(true, blind)[0, 1])
    assert (found.num_clips, found.num_samples) == (2, len(true) // 2)


def test_models_are_probed_at_the_size_they_name_else_small_ones_small_and_full_ones_full(pipe, monkeypatch):
    assert natural_size(pipe) == (17, 128, 128)
    monkeypatch.setattr(pipe.dit, "dim", 1536)
    assert natural_size(pipe) == (17, 480, 832)
    monkeypatch.setattr(pipe, "defaults", RunDefaults(options={"height": 96, "width": 64, "num_frames": 9}))
    assert natural_size(pipe) == (9, 96, 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clips": 0}, "clips must be at least 1; got 0"),
        ({"clips": []}, r"clips must be one or more of the same size; got \[\]"),
        (
            {"clips": [make_clip(0)], "height": 64},
            "height, width, num_frames and scenes apply to drawn clips only",
        ),
        ({"clips": [make_clip(0, height=40)]}, r"whole tokens of 16 x 16 pixels in size; got 40 x 64"),
        ({"sigmas": ()}, "sigmas must be one or more different numbers"),
        ({"taus": (1, 1)}, "taus must be one or more different numbers"),
        ({"sigmas": (0,)}, r"sigmas must be in \(0, 1\]"),
        ({"taus": (-1,)}, "tau must be a finite number above 0"),
        ({"blocks": [2]}, r"blocks must be in 0..1 for this DiT; got \[2\]"),
        ({"prompt": "a dog"}, "prompt must be '' or 'caption'; got 'a dog'"),
        ({"tokens": "none"}, "tokens must be one of object, all; got 'none'"),
        ({"sf": 1}, "sf >= 2; got 17 frames, sf=1"),
        ({"num_frames": 1}, "motion needs two latent frames"),
        (
            {**TINY, "tokens": "all", "scenes": SceneOptions(still=1, camera=0, spin=0, growth=0)},
            "the clips have no motion",
        ),
    ],
)
def test_bad_arguments_are_named_before_a_model_runs(pipe, monkeypatch, options, message):
    monkeypatch.setattr(pipe.vae, "encode", None)
    with pytest.raises(ValueError, match=message):
        probe_motion(pipe, **(options if "clips" in options else {**TINY, **options}))


def test_features_that_are_not_finite_are_an_error(pipe):
    weight = pipe.dit.blocks[1].self_attn.q.weight
    kept = weight.data.clone()
    weight.data.fill_(float("nan"))
    try:
        with pytest.raises(RuntimeError, match="block 1 gives features that are not finite"):
            probe_motion(pipe, **SMALL)
    finally:
        weight.data.copy_(kept)


def made_result(partial, slope, **changes):
    shape = partial.shape
    values = {
        "correlation": np.zeros(shape), "slope": np.zeros(shape), "partial_correlation": partial,
        "partial_slope": slope, "blocks": tuple(range(2, 2 + shape[0])), "readings": (0, 1, "mean_qk"),
        "sigmas": (0.9, 0.7, 0.3), "taus": (1.0, 4.0), "blind": 0.5, "num_clips": 1, "num_samples": 9,
        "size": (17, 64, 64), "sf": 4, "tokens": "object", "prompt": "", "seed": 0,
    }  # fmt: skip
    return ProbeResult(**{**values, **changes})


@pytest.fixture
def made():
    partial, slope = np.zeros((2, 3, 3, 2)), np.ones((2, 3, 3, 2))
    partial[1, 2, :, 1] = (0.5, 0.8, 0.1)
    partial[0, 1, :, 0] = (0.9, 0.1, 0.9)
    partial[1, 0, :2] = 0.651, 0.651
    slope[1, 0, :, 0] = 0.1
    return made_result(partial, slope)


def test_the_best_reading_has_the_highest_mean_correlation_then_the_slope_nearest_1(made):
    best = made.best()[0]
    assert (best.block, best.heads, best.tau, best.sigmas) == (2, (1,), 1.0, (0.9, 0.7, 0.3))
    assert best.correlation == pytest.approx(1.9 / 3)
    # 0.65 each to two decimals: the slopes decide between taus, then between rows.
    first, second = made.best((0.5, 1.0), count=2)
    assert (first.block, first.heads, first.tau) == (3, (0,), 4.0)
    assert (second.block, second.heads, second.correlation) == (3, "mean_qk", pytest.approx(0.65))
    assert made.best(0.7)[0].heads == "mean_qk"
    assert len(made.best(count=None)) == 6
    assert made.best(kind="whole")[0].correlation == 0


def test_the_suggestion_fits_motion_guidance(made):
    assert suggest(made, 0.7) == {"block": 3, "heads": "mean_qk", "tau": 4.0}
    guidance = MotionGuidance(**suggest(made))
    assert (guidance.block, guidance.heads, guidance.tau) == (3, (0,), 4.0)


def test_the_table_has_a_row_for_each_reading_best_first(made):
    lines = made.table().splitlines()
    assert "1 clips of 17 frames, 64x64; 9 tokens (object), sf=4, prompt '', seed 0." in lines[1]
    assert lines[3] == "| block | heads | tau | sigma 0.9 | sigma 0.7 | sigma 0.3 | mean |"
    assert lines[5] == "| 2 | head 1 | 1 | 0.90 / 1.00 | 0.10 / 1.00 | 0.90 / 1.00 | 0.63 / 1.00 |"
    assert len(lines) == 5 + 6
    assert made.table(count=1, sigma=0.7).splitlines()[5].startswith("| 3 | mean_qk | 4 | 0.50 / 1.00 | 0.80")
    assert "Seeing nothing has correlation 0.50" in made.table(kind="whole")


def test_the_heat_map_has_a_panel_for_each_noise_level_and_shows_the_values(made):
    pytest.importorskip("matplotlib")
    figure = made.heat_map()
    assert [axes.get_title() for axes in figure.axes] == ["sigma 0.9", "sigma 0.7", "sigma 0.3"]
    first = figure.axes[0]
    assert [label.get_text() for label in first.get_xticklabels()] == ["head 0", "head 1", "mean_qk"]
    assert [label.get_text() for label in first.get_yticklabels()] == ["block 2", "block 3"]
    for index, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(
            axes.images[0].get_array(), made.partial_correlation[:, :, index].max(-1)
        )
        assert axes.images[0].get_clim() == (-1, 1)
    framed = [text for axes in figure.axes for text in axes.texts if text.get_bbox_patch()]
    assert [(text.axes, text.get_position(), text.get_text()) for text in framed] == [(first, (1, 0), "0.90")]
    at_tau = made.heat_map(tau=4.0).axes[0].images[0].get_array()
    np.testing.assert_array_equal(at_tau, made.partial_correlation[:, :, 0, 1])
    assert not made.heat_map(kind="whole").axes[0].images[0].get_array().any()
    red, _green, blue, _opacity = first.images[0].to_rgba(np.array([1.0, -1.0]))[0]
    assert red > 0.3 > blue
    many = made_result(*np.zeros((2, 2, 45, 3, 2)), readings=tuple(range(45))).heat_map()
    assert len({axes.get_subplotspec().get_position(many).x0 for axes in many.axes}) == 1


def test_a_saved_result_comes_back_as_it_was(result, tmp_path):
    paths = result.save(tmp_path / "probe")
    assert [path.name for path in paths] == ["probe.json", "probe.md", "probe.png"]
    assert paths[1].read_text().count("| block | heads | tau |") == 2
    for path in (tmp_path / "probe", paths[0]):
        loaded = ProbeResult.load(path)
        for name in ProbeResult.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(loaded, name), getattr(result, name))
        assert (loaded.readings, loaded.size) == (result.readings, result.size)
        assert loaded.best() == result.best()


def test_what_is_no_result_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"probe.json does not exist; write it by ProbeResult.save"):
        ProbeResult.load(tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({"correlation": []}))
    with pytest.raises(ValueError, match="holds no probe result: it must have correlation, slope"):
        ProbeResult.load(tmp_path)
    with pytest.raises(ValueError, match=r"slope must be \[blocks, .*\] = \[2, 3, 3, 2\]; got \[2\]"):
        replace(made, slope=np.zeros(2))
    with pytest.raises(ValueError, match=r"sigma must mean some of the probed .* got 0.8"):
        made.best(0.8)
    with pytest.raises(ValueError, match="kind must be one of partial, whole; got 'half'"):
        made.table(kind="half")
    with pytest.raises(ValueError, match=r"tau must be one of the probed \(1.0, 4.0\); got 2"):
        made.heat_map(tau=2)


@pytest.mark.slow
def test_the_script_prints_the_table_and_where_the_files_are(tiny_checkpoint, tmp_path):
    command = [sys.executable, "-m", "benchmarks.probe", "--model_dir", tiny_checkpoint]
    options = "--clips 2 --height 64 --width 64 --tokens all --sigmas 0.7 --taus 4 --rows 3 --device cpu"
    output = ["--output_dir", tmp_path / "probe"]
    done = subprocess.run(
        [*command, *options.split(), *output], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n| ") == 1 + 3
    assert "MotionGuidance(block=" in done.stdout
    assert str(tmp_path / "probe" / "probe.png") in done.stdout
    assert ProbeResult.load(tmp_path / "probe").sigmas == (0.7,)
