"""Videos as cameras, phones and tools make them: read upright, square, even in time, in true colours."""

import logging
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from ffmpeg_tool import ffmpeg
from PIL import Image
from safetensors.numpy import load_file

from diffsynth.data import VideoData, fit_frame, save_video

GOLDEN = Path(__file__).parent / "golden"
PHONE = "setpts='if(lt(N,30),N/30,1+(N-30)/15)/TB'"  # a second at 30 frames a second, then one at 15
# A bar of 4 pixels that moves by 60 pixels a second, on black.
BAR = "color=black:s=160x32:r={rate}:d=10,geq=lum='if(between(X-T*60-16,-2,2),235,16)':cb=128:cr=128"


def made(path, source, *options, frames=20):
    ffmpeg("-f", "lavfi", "-i", source, "-frames:v", frames, *options, path)
    return path


def flat(color, size="64x48", rate=10):
    return f"color={color}:s={size}:r={rate}:d=9"


def middle(frame):
    return np.asarray(frame)[frame.height // 2, frame.width // 2].astype(int)


def columns(frames):
    """The column in which the bar stands, in each frame."""
    light = np.stack([np.asarray(frame)[..., 1].astype(float).mean(0) for frame in frames]) - 16
    light = light.clip(40, None) - 40
    return (light * np.arange(light.shape[1])).sum(1) / light.sum(1)


def test_pixels_that_are_not_square_are_made_square(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    circle = "color=black:s=180x144,geq=lum='if(lt(hypot((X-90)*64/45,Y-72),50),235,16)':cb=128:cr=128"
    path = made(tmp_path / "pal.mp4", circle, "-vf", "setsar=64/45", frames=2)
    frame = VideoData(path)[0]
    assert frame.size == (256, 144)
    white = np.argwhere(np.asarray(frame)[..., 0] > 128)
    height, width = white.max(0) - white.min(0)
    assert abs(height - width) <= 2
    assert "pal.mp4: pixels of 64:45 made square: 180x144 -> 256x144" in caplog.text


def test_the_shape_of_pixels_that_a_container_states_comes_before_that_of_the_codec(tmp_path):
    made(tmp_path / "a.mp4", flat("red", "160x120"), "-vf", "setsar=4/3", frames=2)
    for suffix in ("mp4", "mkv"):
        ffmpeg("-i", tmp_path / "a.mp4", "-c", "copy", "-aspect", "2:1", tmp_path / f"b.{suffix}")
        assert VideoData(tmp_path / f"b.{suffix}").shape() == (120, 240)


def test_a_cover_picture_before_the_video_does_not_set_its_size(tmp_path):
    clip, cover = made(tmp_path / "a.mp4", flat("red"), frames=3), tmp_path / "cover.jpg"
    made(cover, flat("blue", "120x80"), frames=1)
    streams = ("-map", 0, "-map", 1, "-c", "copy", "-disposition:v:1", "attached_pic")
    ffmpeg("-i", clip, "-i", cover, *streams, tmp_path / "b.mp4")
    boxes, film = {}, (tmp_path / "b.mp4").read_bytes()
    start = at = film.index(b"moov") + 4
    while at < len(film):  # the boxes of moov, which is the last one
        size = int.from_bytes(film[at : at + 4], "big")
        boxes[film[at + 4 : at + 8]], at = film[at : at + size], at + size
    moved = b"".join(boxes[name] for name in (b"mvhd", b"udta", b"trak"))
    (tmp_path / "b.mp4").write_bytes(film[:start] + moved)
    video = VideoData(tmp_path / "b.mp4")
    assert (len(video), video.shape()) == (3, (48, 64))
    assert middle(video[2])[0] > 250


def test_a_turned_video_with_oblong_pixels_is_as_high_as_it_should_be(tmp_path):
    flat_file, turned = tmp_path / "flat.mp4", tmp_path / "turned.mp4"
    made(flat_file, flat("red", "90x64"), "-vf", "setsar=2", frames=3)
    ffmpeg("-display_rotation", 90, "-i", flat_file, "-c", "copy", turned)
    assert VideoData(turned).shape() == (90, 32)
    assert VideoData(turned)[0].size == (32, 90)


def test_interlaced_video_is_deinterlaced(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    moving = BAR.format(rate=50)
    weave = "tinterlace=interleave_top,setfield=tff"
    options = ("-vf", weave, "-flags", "+ilme+ildct", "-c:v", "libx264", "-x264-params", "tff=1")
    path = made(tmp_path / "tv.mp4", moving, *options, "-r", 25)
    frame = np.asarray(VideoData(path)[10])[..., 1].astype(int)
    combing = np.abs(frame[1:-1] - (frame[:-2] + frame[2:]) / 2).mean()
    assert combing < 1.0
    assert "tv.mp4: deinterlaced" in caplog.text


@pytest.mark.parametrize(("transfer", "name"), [("smpte2084", "PQ"), ("arib-std-b67", "HLG")])
def test_hdr_is_tone_mapped(tmp_path, caplog, transfer, name):
    caplog.set_level(logging.INFO)
    ramps = "r='30+X':g='30+Y*1.5':b='200-X/2-Y/2'"
    plain = f"color=black:s=192x128:r=10:d=1,format=gbrp,geq={ramps}"
    to_hdr = (
        "setparams=color_primaries=bt709:color_trc=bt709:colorspace=gbr:range=pc,zscale=t=linear:npl=203,"
        f"format=gbrpf32le,zscale=p=bt2020,zscale=t={transfer}:m=bt2020nc:r=tv:npl=203,format=yuv420p10le"
    )
    params = f"log-level=error:colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    codec = ("-c:v", "libx265", "-x265-params", params, "-crf", 4)
    path = made(tmp_path / "phone.mp4", f"{plain},format=gbrp,{to_hdr}", *codec, frames=3)
    made(tmp_path / "true.mkv", plain, "-c:v", "ffv1", "-pix_fmt", "bgr0", frames=3)
    true = np.asarray(VideoData(tmp_path / "true.mkv")[1]).astype(float)
    found = np.asarray(VideoData(path)[1]).astype(float)
    assert np.abs(found - true).mean() < 2.5
    assert found.std() == pytest.approx(true.std(), rel=0.03)
    assert f"phone.mp4: HDR ({name}) tone-mapped" in caplog.text


@pytest.mark.parametrize("tags", ["smpte2084", "arib-std-b67:colorprim=bt2020"])
def test_hdr_without_all_its_tags_is_taken_for_the_usual_kind(tmp_path, tags):
    read = []
    for name, params in (
        ("some", tags),
        ("all", f"{tags.split(':')[0]}:colorprim=bt2020:colormatrix=bt2020nc"),
    ):
        codec = ("-c:v", "libx265", "-pix_fmt", "yuv420p10le", "-x265-params")
        params = f"log-level=error:transfer={params}"
        path = made(tmp_path / f"{name}.mp4", "testsrc2=s=64x48", *codec, params, frames=2)
        read.append(np.asarray(VideoData(path)[1]))
    np.testing.assert_array_equal(*read)


def test_transparent_pixels_lie_over_black(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clear = "color=0x00FF00:s=64x48:r=10:d=9,format=rgba,colorchannelmixer=aa=0"
    half = "color=0x00FF00:s=64x48:r=10:d=9,format=rgba,colorchannelmixer=aa=0.5"
    for source, level in ((clear, 0), (half, 128)):
        for name, options in (
            ("a.webm", ("-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p")),
            ("a.mov", ("-c:v", "prores_ks", "-pix_fmt", "yuva444p10le")),
            ("a.mkv", ("-c:v", "ffv1", "-pix_fmt", "bgra")),
        ):
            caplog.clear()
            path = made(tmp_path / name, source, *options, frames=3)
            red, green, blue = middle(VideoData(path)[1])
            assert abs(green - level) <= 4, (name, green)
            assert max(red, blue) <= 6, name
            assert "transparent pixels, if any, laid over black" in caplog.text
    opaque = made(
        tmp_path / "b.mkv", flat("0x80A0C0") + ",format=rgba", "-c:v", "ffv1", "-pix_fmt", "bgra", frames=2
    )
    assert VideoData(opaque)[1].getcolors() == [(64 * 48, (128, 160, 192))]
    folder = tmp_path / "png"
    folder.mkdir()
    for index in range(2):
        Image.new("RGBA", (8, 8), (0, 255, 0, 0)).save(folder / f"{index}.png")
    assert tuple(middle(VideoData(image_folder=folder)[0])) == (0, 0, 0)


@pytest.mark.parametrize("name", ["phone.mp4", "phone.mkv", "recorder.webm"])
def test_a_variable_rate_is_read_at_its_constant_mean(tmp_path, caplog, name):
    caplog.set_level(logging.INFO)
    codec = ("-c:v", "libvpx") if name.endswith("webm") else ("-c:v", "libx264", "-crf", 4)
    options = ("-vf", PHONE, "-fps_mode", "passthrough", "-enc_time_base", "1/1000", *codec)
    path = made(tmp_path / name, BAR.format(rate=30), *options, frames=45)
    data = VideoData(path)
    assert len(data) == 45
    assert data.fps == pytest.approx(45 / (29 / 15 + 1 / 20), rel=0.02)
    assert "variable rate" in caplog.text
    assert "damaged" not in caplog.text
    # Frames of the file show the bar at N / 30 s; at an even rate the file's time passes evenly.
    shown = (columns(data) - 16) / 60 * 30
    seconds = np.where(shown < 30, shown / 30, 1 + (shown - 30) / 15)
    assert np.abs(seconds - np.arange(45) / data.fps).max() < 1 / 15


def test_a_long_file_whose_rate_has_more_decimals_than_are_told_is_even(tmp_path):
    path = tmp_path / "long.mp4"
    made(path, "color=red:s=16x16:r=15000/1001:d=999", "-preset", "ultrafast", frames=3000)
    assert len(VideoData(path)) == 3000


def test_small_jitter_is_no_variable_rate(tmp_path):
    jitter = (
        "-vf",
        "setpts='(N+0.3*mod(N,2))/15/TB'",
        "-fps_mode",
        "passthrough",
        "-enc_time_base",
        "1/90000",
    )
    path = made(tmp_path / "jitter.mp4", BAR.format(rate=15), *jitter)
    data = VideoData(path)
    assert len(data) == 20
    assert np.abs(np.diff(columns(data)) - 4).max() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".webm", ".mov", ".ts"])
@pytest.mark.parametrize("rate", ["24000/1001", "30000/1001", "25", "60"])
def test_fractional_rates_are_exact_in_and_out(tmp_path, suffix, rate):
    codec = ("-c:v", "libvpx") if suffix == ".webm" else ()
    path = made(tmp_path / f"in{suffix}", flat("gray", rate=rate), *codec, "-r", rate)
    video = VideoData(path)
    assert video.fps == float(Fraction(rate))
    if suffix != ".ts":
        saved = VideoData(save_video(video, tmp_path / f"out{suffix}", fps=video.fps))
        assert (saved.fps, len(saved)) == (video.fps, 20)


def test_a_part_at_another_rate(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = made(tmp_path / "bar.mp4", BAR.format(rate=60), "-g", 12, "-crf", 4, frames=120)
    whole = columns(VideoData(path))
    part = VideoData(path, start=0.5, end=1.0)
    assert len(part) == 30
    np.testing.assert_allclose(columns(part), whole[30:60], atol=0.3)
    assert columns([part[29], part[0]]) == pytest.approx(whole[[59, 30]], abs=0.3)
    slow = VideoData(path, fps=15, start=0.5)
    assert (len(slow), slow.fps) == (22, 15.0)
    assert np.abs(columns(slow) - whole[30::4][:22]).max() < 2.1  # half a frame at 15
    assert len(VideoData(path, fps=120)) == 240
    assert "60 frames a second, read at 15" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 9.0}, r"no frame of .* lies from start=9.0 to end=None; it lasts 2 s"),
        ({"start": 1.0, "end": 1.0}, "no frame of"),
        ({"fps": 0}, "fps must be a number, above 0, got 0"),
        ({"start": -1}, "start must be a number, 0 or more seconds, got -1"),
        ({"end": "2"}, "end must be a number, above 0, got '2'"),
        ({"fit": "zoom"}, "fit must be one of crop, pad, stretch, got 'zoom'"),
    ],
)
def test_a_wrong_part_is_refused_by_name(tmp_path, arguments, message):
    path = made(tmp_path / "a.mp4", flat("gray"))
    with pytest.raises(ValueError, match=message):
        VideoData(path, **arguments)


def test_an_image_folder_has_no_seconds(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"fps=16 need a video file"):
        VideoData(image_folder=tmp_path, fps=16)


def test_only_what_is_used_of_a_long_video_is_decoded(tmp_path, monkeypatch):
    path = made(tmp_path / "long.mp4", flat("gray", "32x32", 30), "-preset", "ultrafast", frames=270)
    commands = []
    popen = subprocess.Popen

    def watched(command, *args, **kwargs):
        commands.append([*map(str, command)])
        return popen(command, *args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", watched)
    video = VideoData(path)
    assert len(video) == 270
    assert [("-c" in command and "copy" in command) for command in commands] == [True]
    assert len(video[:17]) == 17
    assert len(commands) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "suffix", [".mp4", ".mkv", ".ts", ".mpg", ".avi", ".flv", ".wmv", ".gif", ".h264", ".y4m"]
)
def test_every_frame_of_every_container_once(tmp_path, suffix):
    options = ("-pix_fmt", "yuv420p") if suffix not in (".gif",) else ()
    path = made(tmp_path / f"a{suffix}", BAR.format(rate=25), *options, "-r", 25, frames=40)
    data = VideoData(path)
    assert len(data) == 40
    assert np.abs(np.diff(columns(data)) - 2.4).max() < 1.2


@pytest.mark.parametrize(
    "suffix", [".mp4", ".mkv", ".ts", ".mpg", ".avi", ".flv", ".wmv", ".gif", ".h264", ".y4m"]
)
def test_a_part_of_every_container_is_the_same_part_of_the_whole(tmp_path, suffix):
    options = ("-pix_fmt", "yuv420p") if suffix != ".gif" else ()
    path = made(tmp_path / f"a{suffix}", BAR.format(rate=25), *options, "-r", 25, frames=60)
    whole = np.stack([np.asarray(frame) for frame in VideoData(path)])
    part = VideoData(path, start=1.2, end=2.0)
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in part]), whole[30:50])


def test_a_cut_without_encoding_begins_where_its_edit_list_says(tmp_path):
    made(tmp_path / "a.mp4", BAR.format(rate=25), "-g", 100, frames=50)
    ffmpeg("-ss", 0.8, "-i", tmp_path / "a.mp4", "-c", "copy", tmp_path / "cut.mp4")
    cut = VideoData(tmp_path / "cut.mp4")
    assert len(cut) == 30
    np.testing.assert_allclose(columns(cut), columns(VideoData(tmp_path / "a.mp4"))[20:], atol=0.5)


def test_a_long_sound_adds_no_frames(tmp_path):
    sound = ("-f", "lavfi", "-i", "sine=d=5", "-map", "0:v", "-map", "1:a")
    ffmpeg("-f", "lavfi", "-i", flat("gray"), *sound, "-frames:v", 12, tmp_path / "a.mp4")
    data = VideoData(tmp_path / "a.mp4")
    assert (len(data), len(list(data)), data.fps) == (12, 12, 10.0)


# ------------------------------------------------------------------ out


COLORS = [
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (220, 150, 120),
    (16, 16, 16),
    (255, 255, 255),
    (90, 40, 160),
]


def patches(height=96, width=112):
    frame = np.zeros((height, width, 3), np.uint8)
    for index, color in enumerate(COLORS):
        frame[:, index * 16 : (index + 1) * 16] = color
    return frame


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".webm"])
def test_flat_colours_come_back_within_three_levels(tmp_path, suffix):
    save_video([patches()] * 3, tmp_path / f"a{suffix}", quality=10)
    frame = np.asarray(VideoData(tmp_path / f"a{suffix}")[1]).astype(int)
    assert np.abs(frame[48, 8::16] - np.array(COLORS)).max() <= 3


def test_files_say_that_they_are_bt709(tmp_path):
    from imageio_ffmpeg import get_ffmpeg_exe

    save_video([patches()] * 3, tmp_path / "a.mp4")
    log = subprocess.run([get_ffmpeg_exe(), "-i", tmp_path / "a.mp4"], capture_output=True, text=True).stderr
    assert "yuv420p(tv, bt709, progressive)" in log  # matrix, primaries and transfer alike


@pytest.mark.slow
def test_saving_and_loading_eight_times_does_not_drift(tmp_path):
    rng = np.random.default_rng(0)
    colors = rng.integers(20, 235, (4, 6, 3)).astype(np.uint8)
    first = np.repeat(np.repeat(colors, 16, 0), 16, 1)
    frames = [first] * 3
    for index in range(8):
        frames = [np.asarray(f) for f in VideoData(save_video(frames, tmp_path / f"{index}.mp4", quality=10))]
    inner = (slice(8, None, 16), slice(8, None, 16))
    drift = (frames[1][inner].astype(float) - first[inner]).reshape(-1, 3).mean(0)
    assert np.abs(drift).max() < 0.5


@pytest.mark.parametrize("suffix", [".mkv", ".avi", ".webm"])
def test_lossless_keeps_every_pixel(tmp_path, suffix):
    frames = np.random.default_rng(0).integers(0, 256, (5, 30, 34, 3), dtype=np.uint8)
    path = save_video(frames, tmp_path / f"a{suffix}", lossless=True)
    np.testing.assert_array_equal(np.stack([np.asarray(frame) for frame in VideoData(path)]), frames)


def test_lossless_is_refused_where_it_cannot_be(tmp_path):
    with pytest.raises(
        ValueError, match=r"lossless video needs a path that ends in one of .mkv, .avi, .webm"
    ):
        save_video([patches()], tmp_path / "a.mp4", lossless=True)


def test_a_gif_plays_at_the_rate_with_the_same_frames(tmp_path):
    path = save_video([patches()] * 6, tmp_path / "a.gif", fps=10)
    with Image.open(path) as picture:
        assert (picture.n_frames, picture.info["duration"], picture.info["loop"]) == (6, 100, 0)
    assert np.abs(np.asarray(VideoData(path)[2]).astype(int)[48, 8::16] - np.array(COLORS)).max() <= 8


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".avi", ".webm"])
def test_the_sound_of_the_reference_is_kept(tmp_path, suffix):
    sound = ("-f", "lavfi", "-i", "sine=f=440:d=1", "-map", "0:v", "-map", "1:a")
    ffmpeg("-f", "lavfi", "-i", flat("gray"), *sound, "-frames:v", 30, tmp_path / "ref.mp4")
    path = save_video(
        [patches()] * 20, tmp_path / f"o{suffix}", fps=10, audio_from=tmp_path / "ref.mp4", audio_start=0.5
    )
    ffmpeg("-i", path, "-ac", 1, "-ar", 8000, "-f", "f32le", tmp_path / "sound.raw")
    heard = np.fromfile(tmp_path / "sound.raw", np.float32)
    assert len(VideoData(path)) == 20
    assert len(heard) / 8000 == pytest.approx(2.0, abs=0.1)
    loud = np.abs(heard).reshape(-1)[: 8000 * 19 // 10].reshape(-1, 800).max(1) > 0.02
    assert loud[:4].all()
    assert not loud[6:].any()


def test_a_reference_without_sound_is_told_and_a_gif_has_none(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made(tmp_path / "ref.mp4", flat("gray"))
    save_video([patches()] * 2, tmp_path / "a.mp4", audio_from=tmp_path / "ref.mp4")
    assert "has no sound to keep" in caplog.text
    with pytest.raises(ValueError, match=r"a .gif file has no sound"):
        save_video([patches()] * 2, tmp_path / "a.gif", audio_from=tmp_path / "ref.mp4")


def test_save_path_is_another_name_of_path(tmp_path):
    assert save_video([patches()], save_path=tmp_path / "a.mp4") == tmp_path / "a.mp4"
    with pytest.raises(TypeError, match="save_video needs one path"):
        save_video([patches()])


# ------------------------------------------------------------------ size


def test_cropping_and_resizing_are_those_of_diffsynth():
    golden = load_file(GOLDEN / "crop_resize.safetensors")
    cases = [name for name in golden if "." in name]
    assert len(cases) == 7
    for name in cases:
        image, size = name.split(".")
        height, width = map(int, size.split("x"))
        fitted = fit_frame(Image.fromarray(golden[image]), height, width)
        np.testing.assert_array_equal(np.asarray(fitted), golden[name])


def test_pad_keeps_the_whole_picture_and_stretch_fills():
    image = Image.new("RGB", (40, 40), (200, 10, 10))
    padded = np.asarray(fit_frame(image, 20, 80, "pad"))
    assert (padded[:, :30] == 0).all()
    assert (padded[:, 32:48] == (200, 10, 10)).all()
    assert (np.asarray(fit_frame(image, 20, 80, "stretch")) == (200, 10, 10)).all()
