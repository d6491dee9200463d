"""VideoData: every decoded frame once and in order, from good and damaged files and from image folders."""

import logging
import subprocess
import weakref

import numpy as np
import pytest
from ffmpeg_tool import ffmpeg
from PIL import Image

from diffsynth.data import VideoData, fit_frame, video

EXIF_ORIENTATION = 0x0112


def mean_levels(frames):
    return [int(np.asarray(frame).mean().round()) for frame in frames]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 frames of 96x64 at 10 fps; frame i is grey of level 10 i + 10, so that its order shows."""
    path = tmp_path_factory.mktemp("clip") / "grey.mp4"
    grey = "color=c=black:s=96x64:r=10:d=2,format=gray,geq=lum='10*N+10'"
    ffmpeg("-f", "lavfi", "-i", grey, "-pix_fmt", "yuvj420p", "-crf", 4, "-movflags", "+faststart", path)
    return path


@pytest.fixture
def decoders(monkeypatch):
    """Every decoder process started, and the number of frames that came out of them."""
    log = {"processes": [], "frames": 0}
    popen, fromarray = subprocess.Popen, Image.fromarray

    def counted_popen(*args, **kwargs):
        log["processes"].append(popen(*args, **kwargs))
        return log["processes"][-1]

    def counted_fromarray(*args, **kwargs):
        log["frames"] += 1
        return fromarray(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", counted_popen)
    monkeypatch.setattr(video.Image, "fromarray", counted_fromarray)
    return log


def running(log):
    return sum(process.poll() is None for process in log["processes"])


@pytest.fixture
def image_dir(tmp_path):
    for number in (10, 2, 1):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"frame{number}.png")
    return tmp_path


def test_frames_come_in_order_by_index_slice_and_iteration(clip):
    data = VideoData(clip)
    expected = [10 * index + 10 for index in range(20)]
    assert len(data) == 20
    assert np.abs(np.subtract(mean_levels(data), expected)).max() <= 2
    levels = mean_levels(data)
    assert mean_levels(data[index] for index in range(20)) == levels
    assert mean_levels(data[3:11:4]) == levels[3:11:4]
    assert mean_levels(data[::-6]) == levels[::-6]
    assert mean_levels([data[-1], data[-20], data[7], data[6]]) == [levels[i] for i in (19, 0, 7, 6)]
    assert mean_levels(data.raw_data()) == levels
    assert data[4:4] == []


def test_frames_are_rgb_images_of_the_size_that_shape_tells(clip):
    data = VideoData(str(clip))
    assert data.shape() == (64, 96)
    assert data.fps == pytest.approx(10.0)
    assert (data[0].mode, data[0].size) == ("RGB", (96, 64))
    fitted = VideoData(clip, height=32, width=32)
    assert fitted.shape() == (32, 32)
    assert {frame.size for frame in fitted} == {fitted[5].size} == {(32, 32)}
    assert repr(fitted) == f"VideoData({str(clip)!r}, frames=20, height=32, width=32, fps=10.0)"


@pytest.mark.parametrize("index", [20, -21])
def test_an_index_outside_is_an_index_error(clip, index):
    with pytest.raises(IndexError, match=f"frame {index} of a video of 20 frames"):
        VideoData(clip)[index]


def test_going_forward_by_index_decodes_each_frame_once(clip, decoders):
    data = VideoData(clip)
    decoders["frames"] = 0
    for index in range(len(data)):
        assert data[index].tobytes() == data[index].tobytes()
    assert decoders["frames"] == 20
    assert running(decoders) == 0
    data[2]
    assert decoders["frames"] == 23


def test_no_decoder_stays_after_the_end_a_break_a_with_block_or_the_object(clip, decoders):
    data = VideoData(clip)
    assert running(decoders) == 0
    assert len(list(data)) == 20
    for _ in data:
        break
    assert running(decoders) == 0
    with VideoData(clip) as opened:
        opened[3]
        assert running(decoders) == 1
    assert running(decoders) == 0
    assert opened[1].size == (96, 64)
    assert running(decoders) == 1
    del opened
    assert running(decoders) == 0


def test_iteration_holds_one_frame_at_a_time(clip, monkeypatch):
    frombytes, decoded = Image.frombytes, []

    def tracked(*args, **kwargs):
        image = frombytes(*args, **kwargs)
        decoded.append(weakref.ref(image))
        return image

    monkeypatch.setattr(video.Image, "frombytes", tracked)
    counts = [sum(frame() is not None for frame in decoded) for _ in VideoData(clip)]
    assert len(counts) == 20
    assert 1 <= max(counts) <= 2


def test_two_iterations_at_once_do_not_disturb_each_other(clip):
    data = VideoData(clip)
    pairs = [mean_levels(pair) for pair in zip(data, data, strict=True)]
    assert len(pairs) == 20
    assert all(left == right for left, right in pairs)


def test_drawing_on_a_frame_does_not_change_the_video(clip):
    data = VideoData(clip)
    frame = data[5]
    before = frame.tobytes()
    frame.paste((255, 0, 0), (0, 0, 96, 64))
    assert data[5].tobytes() == before


def test_set_length_keeps_the_first_frames(clip, decoders):
    data = VideoData(clip)
    data.set_length(3)
    assert len(data) == len(list(data)) == 3
    assert mean_levels([data[-1]]) == mean_levels([VideoData(clip)[2]])
    assert running(decoders) == 0
    with pytest.raises(IndexError):
        data[3]
    data.set_length(20)
    assert len(data.raw_data()) == 20


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None])
def test_a_length_that_is_no_positive_integer_is_refused(clip, n):
    with pytest.raises(ValueError, match="n must be an integer of at least 1"):
        VideoData(clip).set_length(n)


def test_a_length_beyond_the_frames_is_refused(clip):
    with pytest.raises(ValueError, match=r"n must be at most 20.*got 21"):
        VideoData(clip).set_length(21)


def test_a_turned_phone_video_comes_upright(tmp_path):
    flat, turned = tmp_path / "flat.mp4", tmp_path / "turned.mp4"
    ffmpeg("-f", "lavfi", "-i", "color=red:s=96x32:r=5:d=1,pad=96:64", flat)
    ffmpeg("-display_rotation", 90, "-i", flat, "-c", "copy", turned)
    assert VideoData(flat).shape() == (64, 96)
    upright = VideoData(turned)
    assert upright.shape() == (96, 64)
    # Turned by 90 degrees anticlockwise, the red upper half lies on the left.
    pixels = np.asarray(upright[0])
    assert pixels[48, 8, 0] > 200
    assert pixels[48, 56, 0] < 50


@pytest.mark.parametrize("name", ["-pipe:1 %03d.mp4", "[error] matches no streams 99 fps.mp4"])
def test_a_strange_file_name_is_only_a_name(clip, tmp_path, monkeypatch, caplog, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(clip.read_bytes())
    data = VideoData(name)
    assert len(data) == 20
    assert data.fps == pytest.approx(10.0)
    assert caplog.messages == []


def test_a_missing_file_and_folder_are_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"video file .*none.mp4 does not exist"):
        VideoData(tmp_path / "none.mp4")
    with pytest.raises(FileNotFoundError, match=r"image_folder .*none does not exist"):
        VideoData(image_folder=tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", r"empty \(0 bytes\)"), (b"no video" * 99, "damaged or no video"), (None, "moov atom not found")],
)
def test_a_file_that_is_no_video_is_refused_by_name(clip, tmp_path, content, message):
    path = tmp_path / "bad.mp4"
    if content is None:
        ffmpeg("-i", clip, "-c", "copy", "-movflags", "0", path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.mp4 .*{message}"):
        VideoData(path)


def test_a_sound_file_has_no_video_stream(tmp_path):
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", tmp_path / "sound.mp4")
    with pytest.raises(ValueError, match=r"sound\.mp4 has no video stream"):
        VideoData(tmp_path / "sound.mp4")


def test_a_folder_as_file_and_a_file_as_folder_are_refused(clip):
    with pytest.raises(ValueError, match="is not a file; for a folder of images give image_folder"):
        VideoData(clip.parent)
    with pytest.raises(ValueError, match="is not a folder; for a video file give video_file"):
        VideoData(image_folder=clip)


def test_a_cut_file_gives_the_frames_that_decode_and_a_warning(tmp_path, caplog):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=128x96:r=10:d=3", "-movflags", "+faststart", whole)
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with caplog.at_level(logging.WARNING, logger="diffsynth.data.video"):
        assert len(VideoData(whole)) == 30
        assert caplog.messages == []
        data = VideoData(cut)
    assert 1 <= len(data) < 25
    assert len(list(data)) == len(data[:]) == len(data)
    assert f"cut.mp4 is damaged: {len(data)} frames decode, its header promises about 30" in caplog.text


def test_a_first_frame_far_from_a_keyframe_is_not_called_damage(clip, monkeypatch):
    """imageio waits ten seconds for it, however large the frames before it are."""

    def waits(*_given, **_options):
        monkeypatch.setattr(video, "LONGEST_START", 0.0)
        raise OSError("Could not load meta information")
        yield

    monkeypatch.setattr("imageio.v3.imiter", waits)
    with (
        VideoData(clip, start=0.5) as part,
        pytest.raises(ValueError, match="no keyframe is near it") as told,
    ):
        part[0]
    assert "damaged" not in str(told.value)


def test_a_file_that_shrinks_after_opening_is_an_error_not_a_short_video(clip, tmp_path):
    path = tmp_path / "changing.mp4"
    path.write_bytes(clip.read_bytes())
    data = VideoData(path)
    ffmpeg("-i", clip, "-frames:v", 5, path)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"changing\.mp4 is damaged or has changed: 5 frames decode, 20 when"
        ):
            data[10]
    with pytest.raises(ValueError, match="changed: 5 frames decode"):
        list(data)


@pytest.mark.parametrize("sources", [{}, {"video_file": "a.mp4", "image_folder": "b"}])
def test_exactly_one_source_is_needed(sources):
    with pytest.raises(ValueError, match="give one of video_file and image_folder"):
        VideoData(**sources)


def test_an_unknown_option_is_a_type_error(clip):
    with pytest.raises(TypeError, match="lenght"):
        VideoData(clip, lenght=4)


@pytest.mark.parametrize("size", [{"height": 32}, {"width": 32}])
def test_one_side_alone_is_refused(clip, size):
    with pytest.raises(ValueError, match="both height and width or neither"):
        VideoData(clip, **size)


@pytest.mark.parametrize("side", [0, -16, 16.0, "16", True])
def test_a_side_that_is_no_positive_integer_is_refused_before_reading(side):
    with pytest.raises(ValueError, match="height must be an integer of at least 1"):
        VideoData("missing.mp4", height=side, width=16)
    with pytest.raises(ValueError, match="width must be an integer of at least 1"):
        VideoData("missing.mp4", height=16, width=side)


def test_images_come_in_natural_order_without_frame_rate(image_dir):
    (image_dir / "notes.txt").write_text("no image")
    (image_dir / "._frame1.png").write_bytes(b"resource fork")
    data = VideoData(image_folder=image_dir)
    assert [frame.getpixel((0, 0))[0] for frame in data] == [1, 2, 10]
    assert data[-1].getpixel((0, 0)) == (10, 0, 0)
    assert data.shape() == (6, 8)
    assert data.fps is None


def test_every_image_format_and_mode_becomes_rgb(tmp_path):
    red = Image.new("RGB", (8, 8), (200, 10, 30))
    red.save(tmp_path / "0.bmp")
    red.save(tmp_path / "1.JPG", quality=95)
    red.save(tmp_path / "2.webp", lossless=True)
    red.convert("RGBA").save(tmp_path / "3.png")
    red.quantize(4).save(tmp_path / "4.png")
    red.convert("L").save(tmp_path / "5.png")
    Image.fromarray(np.full((8, 8), 100 * 256, np.uint16)).save(tmp_path / "6.jpeg.png")
    pixels = [frame.getpixel((4, 4)) for frame in VideoData(image_folder=tmp_path)]
    assert np.abs(np.subtract(pixels[:5], (200, 10, 30))).max() <= 3
    assert pixels[5:] == [(69, 69, 69), (100, 100, 100)]


def test_exif_orientation_turns_images_upright(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 0, 0), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    image.save(tmp_path / "a.png", exif=exif)
    image.save(tmp_path / "b.jpg", exif=exif, quality=95)
    data = VideoData(image_folder=tmp_path)
    assert data.shape() == (8, 4)
    # Orientation 6 turns a quarter clockwise: the red left half goes up.
    for frame in data:
        assert frame.getpixel((2, 1))[0] > 240 > 15 > frame.getpixel((2, 6))[0]


def test_images_of_differing_sizes_need_a_target_size(image_dir):
    Image.new("RGB", (9, 6)).save(image_dir / "frame3.png")
    with pytest.raises(
        ValueError, match=r"frame3\.png is 9x6, but frame1\.png is 8x6: give height and width"
    ):
        VideoData(image_folder=image_dir)
    assert {frame.size for frame in VideoData(image_folder=image_dir, height=4, width=4)} == {(4, 4)}


def test_a_folder_without_images_and_a_broken_image_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        VideoData(image_folder=tmp_path)
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        VideoData(image_folder=tmp_path)
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        VideoData(image_folder=tmp_path, height=4, width=4)[0]


def test_save_images_writes_all_frames_and_overwrites_none(clip, image_dir, tmp_path):
    data = VideoData(clip)
    data.save_images(tmp_path / "deep" / "out")
    saved = VideoData(image_folder=tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir())[:3] == [
        "0.png",
        "1.png",
        "10.png",
    ]
    assert [frame.tobytes() for frame in saved] == [frame.tobytes() for frame in data]
    with pytest.raises(FileExistsError, match=r"already holds images \(frame1\.png"):
        data.save_images(image_dir)
    assert not (image_dir / "0.png").exists()


def test_fit_frame_crops_the_centre_and_keeps_a_frame_that_fits():
    image = Image.new("RGB", (60, 20), (255, 0, 0))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    assert fit_frame(image, 20, 60) is image
    # The blue centre fills the frame; the filter reaches over the edge, so the outer pixels may blend.
    for turned, side in ((image, 10), (image.rotate(90, expand=True), 40)):
        fitted = fit_frame(turned, side, side)
        assert fitted.size == (side, side)
        error = np.abs(np.subtract(fitted, (0, 0, 255)))
        assert error.max() < 60
        assert error[side // 5 : -side // 5, side // 5 : -side // 5].max() <= 2
    assert fit_frame(image, np.int64(7), 21).size == (21, 7)


def test_fit_frame_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = np.asarray(fit_frame(Image.fromarray(stripes), 16, 16)).astype(int)
    assert np.abs(small[:, 2:-2] - 127).max() <= 3


def test_fit_frame_refuses_other_things_than_images():
    with pytest.raises(TypeError, match="image must be a PIL image, got ndarray"):
        fit_frame(np.zeros((4, 4, 3), np.uint8), 4, 4)
    with pytest.raises(ValueError, match="height must be an integer of at least 1, got 0"):
        fit_frame(Image.new("RGB", (4, 4)), 0, 4)
