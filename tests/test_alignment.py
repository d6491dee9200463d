"""A reference is laid onto the object of a picture: both places are found, or the reference stays."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.quality.picture_motion import SPRITES, make_pair
from diffsynth import VideoData, WanVideoPipeline
from diffsynth.configs.defaults import RunDefaults
from diffsynth.configs.kinds import AlignmentKind
from diffsynth.configs.options import RunOptions
from diffsynth.evaluation.tracking import track_object
from diffsynth.motion import MotionGuidance
from diffsynth.planning.alignment import align, shift
from diffsynth.planning.reference import reference_pixels, warn_of_reference

HEIGHT, WIDTH, FRAMES = 96, 128, 9


def scene(row, column, radius, ground="shaded"):
    """A disc on a ground, uint8 [H, W, 3]."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    back = np.empty((HEIGHT, WIDTH, 3))
    back[:] = (30, 60, 160)
    if ground == "shaded":
        back *= (0.8 + 0.4 * columns / WIDTH)[..., None]
    elif ground == "noise":
        back = np.random.default_rng(0).uniform(0, 255, back.shape)
    inside = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
    return np.where(inside[..., None], (240, 220, 30), back).astype(np.uint8)


def video(ground="shaded", radius=12, start=(30.0, 40.0), step=(3.0, 5.0)):
    places = [(start[0] + t * step[0], start[1] + t * step[1]) for t in range(FRAMES)]
    return [Image.fromarray(scene(*place, radius, ground)) for place in places]


def tensor(frames):
    stacked = np.stack([np.asarray(frame) for frame in frames])
    return torch.from_numpy(stacked).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def images(pixels):
    return ((pixels[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("ground", ["plain", "shaded"])
@pytest.mark.parametrize(
    ("row", "column", "radius"), [(60, 80, 12), (48, 64, 22), (20, 100, 7), (30, 40, 12)]
)
def test_the_reference_is_laid_onto_the_pictures_object(ground, row, column, radius):
    pixels, picture = tensor(video(ground)), tensor([scene(row, column, radius, ground)])[:, :, 0]
    found = align(pixels, picture)
    scale = radius / 12
    expected = (column - 64 - scale * (40 - 64), row - 48 - scale * (30 - 48), scale)
    assert found == pytest.approx(expected, abs=1.0)
    moved = shift(pixels, found)
    track = track_object([Image.fromarray(frame) for frame in images(moved)[:3]])
    assert track.centroids[0] == pytest.approx((row, column), abs=1.0)
    assert track.centroids[1] - track.centroids[0] == pytest.approx((3 * scale, 5 * scale), abs=0.5)


def test_an_object_before_a_gradient_of_two_colours_is_found():
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH] + 0.5
    back = np.stack([250 - 2 * rows, 40 + columns, 60 + 2 * rows], axis=-1).clip(0, 255)
    inside = (rows - 60) ** 2 + (columns - 80) ** 2 < 12**2
    picture = np.where(inside[..., None], (20, 20, 20), back).astype(np.uint8)
    found = align(tensor(video()), tensor([picture])[:, :, 0])
    assert found == pytest.approx((40, 30, 1), abs=1)


def test_whole_pixels_are_moved_exactly_and_the_backgrounds_edges_repeated():
    pixels = tensor(video())
    moved = shift(pixels, (5.0, -3.0, 1.0))
    torch.testing.assert_close(moved[..., :-3, 5:], pixels[..., 3:, :-5], atol=1e-5, rtol=0)
    ground = pixels.median(dim=2).values
    for column in range(5):
        expected = ground[:, :, None, 3:, 0].expand(-1, -1, FRAMES, -1)
        torch.testing.assert_close(moved[..., :-3, column], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(shift(pixels, (0.0, 0.0, 1.0)), pixels, atol=1e-5, rtol=0)


def test_the_same_place_needs_no_map():
    pixels = tensor(video())
    assert align(pixels, pixels[:, :, 0]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("what", ["no object", "noise", "nothing moves in noise", "touches the border"])
def test_what_does_not_stand_out_leaves_the_reference_where_it_is(what):
    pixels, picture = tensor(video()), tensor([scene(60, 80, 12)])[:, :, 0]
    if what == "no object":
        picture = tensor([scene(-90, -90, 1)])[:, :, 0]
    elif what == "noise":
        picture = tensor([scene(60, 80, 12, "noise")])[:, :, 0]
    elif what == "touches the border":
        picture = tensor([scene(0, 64, 40)])[:, :, 0]
    else:
        pixels = tensor([Image.fromarray(scene(30, 40, 12, "noise"))] * FRAMES)
    assert align(pixels, picture) is None


def test_a_run_holds_the_numbers_and_says_what_it_did(caplog):
    picture = Image.fromarray(scene(60, 80, 12))
    run = RunOptions(height=HEIGHT, width=WIDTH, num_frames=FRAMES, motion=MotionGuidance())
    with caplog.at_level("INFO"):
        pixels, resolved = reference_pixels(video(), [picture], run)
    assert resolved.align == pytest.approx((40, 30, 1), abs=1)
    assert "the reference is moved 40 pixels right and 30 down and scaled by 1" in caplog.text
    again = RunOptions.from_json(json.loads(json.dumps(resolved.to_json())))
    assert again == resolved
    assert torch.equal(reference_pixels(video(), [picture], again)[0], pixels)
    by_hand = RunOptions(**{**vars_of(run), "align": (40, 30)})
    assert by_hand.align == (40, 30, 1.0)
    moved = reference_pixels(video(), [], by_hand)[0]
    torch.testing.assert_close(moved, shift(tensor(video()), (40, 30, 1.0)))
    for other, pictures in (("none", [picture]), ("object", [])):
        same, left = reference_pixels(video(), pictures, RunOptions(**{**vars_of(run), "align": other}))
        assert left.align == "none"
        torch.testing.assert_close(same, tensor(video()))
    caplog.clear()
    _, left = reference_pixels(video(), [Image.fromarray(scene(60, 80, 12, "noise"))], run)
    assert left.align == "none"
    assert "the reference stays where it is" in caplog.text


def vars_of(run):
    return {name: getattr(run, name) for name in ("height", "width", "num_frames", "motion")}


def test_the_option_reads_what_the_command_passes():
    kind = AlignmentKind()
    assert kind.read("object") == "object"
    assert kind.read("12,-3.5") == (12, -3.5, 1.0)
    assert kind.read("12,-3.5,1.2") == (12, -3.5, 1.2)
    for wrong in ("left", "1", "1,2,3,4", "1,2,0", "nan,2", "1,2,99"):
        with pytest.raises((ValueError, TypeError)):
            kind.read(wrong)
    for wrong in ("left", [1], (1, 2, True), {"a": 1}, 5, None, ("1", "2")):
        with pytest.raises(ValueError, match=r"align must be object, none, or pixels to the right"):
            RunOptions(align=wrong)


def told_of(caplog, frames, fps=None):
    """The warnings that a reference gives."""
    caplog.clear()
    warn_of_reference(tensor(frames), fps)
    return [record.getMessage() for record in caplog.records]


def test_a_mover_that_comes_in_later_is_told_with_its_frame(caplog):
    enters = [Image.fromarray(scene(40, -40 + 6 * t, 12)) for t in range(25)]
    (message,) = told_of(caplog, enters, fps=10)
    assert message == "what moves is not yet in the reference before frame 6 (0.6 s); start leaves that out"
    assert told_of(caplog, enters[9:]) == []
    there_and_back = [Image.fromarray(scene(48, 64 + max(0, 4 * (t - 14)), 10)) for t in range(25)]
    assert not any("not yet" in told for told in told_of(caplog, there_and_back))


@pytest.mark.parametrize("move", ["pan", "zoom"])
def test_a_clip_in_which_only_the_camera_moves_is_told(caplog, move):
    world = Image.fromarray(scene(0, 0, 0, "noise")[:12, :16]).resize((384, 288), Image.Resampling.BICUBIC)
    boxes = [(4 * t, 2 * t, 256 + 4 * t, 192 + 2 * t) for t in range(FRAMES)]
    if move == "zoom":
        boxes = [(2 * t, 1.5 * t, 384 - 2 * t, 288 - 1.5 * t) for t in range(FRAMES)]
    frames = [world.resize((128, 96), Image.Resampling.BILINEAR, box) for box in boxes]
    (message,) = told_of(caplog, frames)
    assert message == "only the camera moves in the reference: what is transferred is its pan or zoom"
    for t, frame in enumerate(frames):  # and something large that moves against it
        frame.paste((250, 40, 20), (80 - 8 * t, 20, 130 - 8 * t, 80))
    assert told_of(caplog, frames) == []


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_a_few_frames_are_looked_at_without_a_fault(caplog, frames):
    assert told_of(caplog, video()[:frames]) == []
    faint = [Image.new("RGB", (WIDTH, HEIGHT), (90 + 2 * t,) * 3) for t in range(frames)]
    assert not any("not yet" in text for text in told_of(caplog, faint))


@pytest.mark.parametrize("name", ["bounce", "circle", "zigzag", "source"])
def test_nothing_is_told_of_the_shipped_clips(caplog, name):
    path = Path(__file__).parent.parent / "examples" / "data" / f"{name}.mp4"
    clip = VideoData(path, height=64, width=64)
    assert told_of(caplog, list(clip)[:17], clip.fps) == []


def test_nothing_is_told_of_the_benchs_ordinary_pairs(caplog):
    for index in range(16):
        pair = make_pair(index, SPRITES, False)
        assert told_of(caplog, [Image.fromarray(frame) for frame in pair.reference]) == []


def test_a_reference_that_the_vae_cannot_read_is_told_before_the_first_step(caplog):
    pipe = WanVideoPipeline.from_pretrained("nano-ti2v", device="cpu")
    rough = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)
    run = {
        "num_inference_steps": 1,
        "refine": 0,
        "seed": 0,
        "progress_bar_cmd": None,
        "output_type": "latent",
    }
    for reference, count in ((rough, 1), (make_pair(0, SPRITES, False).reference, 0)):
        caplog.clear()
        told_at_first_step = []

        def note(event, told=told_at_first_step):
            if event.stage == "sampling":
                told.append(caplog.text.count("the model cannot read this reference"))

        pipe("a fox", input_video=reference, observer=note, **run)
        assert told_at_first_step == [count]
    pipe.defaults = RunDefaults(
        options={**pipe.defaults.options, "reads_db": None}, motion=pipe.defaults.motion
    )
    caplog.clear()
    pipe("a fox", input_video=rough, **run)
    assert "cannot read" not in caplog.text
