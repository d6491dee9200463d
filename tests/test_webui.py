"""What the web page does behind its buttons, without a browser and without gradio."""

import base64
import json
import re
import shutil
import threading
import time
import weakref
from argparse import Namespace
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffsynth.configs.options import LoadOptions
from diffsynth.data import VideoData
from diffsynth.jobs.publish import publish
from diffsynth.jobs.task import run_seconds
from diffsynth.pipelines.denoise import RunEvent
from diffsynth.testing import write_checkpoint, write_clip
from diffsynth.webui import panel
from diffsynth.webui.gallery import PastRun, compared, find_run, past_runs, paths_drawn, poster
from diffsynth.webui.page import CLIP_FOLDERS
from diffsynth.webui.previews import Previews, fit_colours, latent_frames
from diffsynth.webui.queue import (
    CANCELLED,
    DONE,
    FAILED,
    JobCancelledError,
    JobQueue,
    QueuedJob,
    QueueFullError,
    RunProgress,
)
from diffsynth.webui.requests import checked_request
from diffsynth.webui.security import Guard, is_local, read_auth
from diffsynth.webui.session import (
    _pace,
    check_budget,
    expected_minutes,
    make_video,
    open_session,
    other_sessions,
    planned,
    show_motion,
)
from diffsynth.webui.uploads import UploadLimits, keep_upload, safe_stem

PATIENCE = 600  # seconds until a test that waits gives up
SMALL = {"prompt": "a cat", "num_inference_steps": 2, "height": 32, "width": 32, "num_frames": 5, "seed": 3}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    cache = folder / "cache"
    cache.mkdir()
    return open_session(
        str(write_checkpoint(folder / "tiny")),
        "models",
        LoadOptions(device="cpu"),
        output_dir=folder / "videos",
        cache=cache,
        limits=UploadLimits(),
    )


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "ref.mp4", num_frames=5, height=32, width=32)


@pytest.fixture
def queue():
    queue = JobQueue(most_waiting=3)
    yield queue
    queue.close()


# Runs.


def test_a_request_becomes_a_video_with_its_record_and_shows_in_the_gallery(session, clip, tmp_path):
    run = make_video(session, checked_request(SMALL), clip, QueuedJob())
    assert json.loads(run.record_file.read_text())["prompt"] == "a cat"
    with VideoData(run.video) as video:
        assert (len(video), video.shape()) == (5, (32, 32))
    assert past_runs(session.output_dir)[0].video == run.video
    assert find_run(session.output_dir, run.video.name).record.options["seed"] == 3
    assert poster(run, tmp_path).stat().st_size > 0
    with VideoData(compared(run, tmp_path)) as both:
        assert both.shape()[1] > 1.9 * 320
    assert "a cat" in panel.finished(run)
    assert "seed 3" in panel.finished(run)


def values_of(prompt, mode, *, seed=3, steps=2, beside=False, model="tiny", seen=None):
    """Return what the page's fields pass to `Page.generate` after the reference."""
    sizes, part = [32, 32, 5], [0, 0, 0, "crop"]
    return [prompt, "", "exact", mode, seed, 0.75, steps, 1, *sizes, *part, None, beside, model, seen]


def test_a_cancelled_run_is_an_error_for_programs_and_a_warning_for_visitors(session, queue):
    gradio = pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    values = values_of("a cat", "No_transfer", steps=200)
    said = Page(session, queue).generate(SimpleNamespace(session_hash="a visitor"), None, *values)
    queue.cancel(next(said)[1])
    with pytest.warns(UserWarning, match="Cancelled"), pytest.raises(gradio.Error) as raised:
        list(said)
    assert not raised.value.visible


def test_runs_of_two_models_share_the_queue_and_one_model_is_in_memory(session, queue, tmp_path):
    pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    page = Page(session, queue, *other_sessions(session, tmp_path))
    assert list(page.sessions) == ["tiny", "Wan2.1-T2V-nano", "Wan2.2-TI2V-nano"]
    visitor, earlier = SimpleNamespace(session_hash="a visitor"), weakref.ref(session.open()[0])
    chosen = ["Wan2.1-T2V-nano", "tiny"]
    clicks = [page.generate(visitor, None, *values_of("red", "No_transfer", model=name)) for name in chosen]
    assert len({next(click)[1] for click in clicks}) == 1  # the second waits
    names = [list(click)[-1][6] for click in clicks]
    folders = [Path(find_run(session.output_dir, name).record.model["folder"]).name for name in names]
    assert folders == chosen
    assert earlier() is None
    assert session.open()[0].defaults.words is None
    assert "takes about" in page.expected(*values_of("red", "No_transfer")[:-4], chosen[0])
    assert page.settings(names[0], None)[-2] == chosen[0]
    for name in ("../tiny", str(session.folder), 3):
        assert (
            "model must be one of tiny"
            in next(page.generate(visitor, None, *values_of("a", "AMF", model=name)))[0]
        )
    loras = replace(session, loaded=LoadOptions(loras={"a.safetensors": 1.0}))
    assert list(other_sessions(loras, tmp_path)) == []  # they fit one model


def test_the_fields_show_the_defaults_of_the_chosen_model(session, tmp_path):
    pytest.importorskip("gradio")
    from diffsynth.webui.app import build
    from diffsynth.webui.page import Page

    nano, with_picture = other_sessions(session, tmp_path)
    demo = build(Page(session, JobQueue(1), nano, with_picture))
    changes = [one for one in demo.fns.values() if "model" in [field.elem_id for field in one.outputs]]
    names = [field.elem_id for field in changes[0].outputs]
    hints = {
        s.folder.name: dict(zip(names, changes[0].fn(s.folder.name, "fast"), strict=True))
        for s in (nano, with_picture, session)
    }
    seen = hints["Wan2.1-T2V-nano"]
    assert re.fullmatch(r"64x64, 17 frames; knows 28 words: a, .*, checkered", seen["model"]["info"])
    assert seen["prompt"]["placeholder"] == "a blue star on a yellow background"
    assert seen["steps"]["placeholder"] == str(nano.defaults.with_preset("fast")["num_inference_steps"])
    assert hints["tiny"]["prompt"]["placeholder"] == "a red fox leaps through fresh snow"
    assert [hint["picture"]["visible"] for hint in hints.values()] == [False, True, False]
    (follow,) = (one for one in demo.fns.values() if one.name == "follow")
    texts = {name: follow.fn(name)[1]["samples"][0][-1] for name in (nano.folder.name, "tiny")}
    assert texts == {
        nano.folder.name: "a blue star on a yellow background",
        "tiny": "a red fox leaps through fresh snow",
    }


def test_a_run_without_transfer_is_shown_between_reference_and_result(
    session, clip, queue, tmp_path, monkeypatch
):
    pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    uploaded = shutil.copy(clip, tmp_path / "beside.mp4")
    values = values_of("a dog", "effi_AMF", seed=5, beside=True, seen=[])
    said = Page(session, queue).generate(SimpleNamespace(session_hash="a visitor"), str(uploaded), *values)
    *_, (_, _, both, *_, names, seen) = said
    runs = [find_run(session.output_dir, name).record for name in seen]
    assert [run.options["motion"] is None for run in runs] == [False, True]
    assert {run.options["seed"] for run in runs} == {5}
    assert set(seen) <= set(names)
    with VideoData(both) as shown:
        assert shown.shape()[1] > 2.9 * 320


def test_the_settings_of_a_past_run_ask_for_it_again(session, clip, queue, places):
    pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    asked = checked_request({**SMALL, "prompt": "A  red fox/runs", "motion_scale": 2, "end": 0.5})
    kept = keep(shutil.copy(clip, places[0] / "my clip.mp4"), places)
    run = make_video(session, asked, kept, QueuedJob())
    assert run.video.name == "a-red-fox-runs-my-clip-seed3.mp4"
    page = Page(session, queue)
    assert run.record.prompt in [caption for _, caption in page.gallery(None)[0]]
    _, reference, *values, picture = page.settings(run.video.name, None)
    of_model, request = page._request(values)
    assert {name: request[name] for name in asked} == {**asked, "prompt": run.record.prompt}
    assert (picture, of_model, Path(reference).read_bytes()) == (None, session, clip.read_bytes())
    assert keep_upload(shutil.copy(reference, places[0]), *places, UploadLimits()) == kept
    assert "not yours" in page.settings(run.video.name, [])[0]
    assert "choose one of the past runs" in page.settings(None, None)[0]
    kept.unlink()
    assert "is not there any more" in page.settings(run.video.name, None)[0]


def test_the_paths_of_reference_and_result_are_drawn(session, tmp_path):
    clip = next(path for folder in CLIP_FOLDERS for path in folder.glob("bounce.mp4"))
    record = make_video(session, checked_request(SMALL), clip, QueuedJob()).record
    video = publish(list(VideoData(clip)), tmp_path / "bounce.mp4", record)
    path = paths_drawn(PastRun(video=video, record=record), tmp_path)
    with VideoData(path) as drawn:
        assert drawn.shape()[1] > 1.9 * 320
    (noise,) = past_runs(session.output_dir, 1)
    assert paths_drawn(noise, tmp_path) is None


def test_a_second_run_of_the_same_kind_takes_a_name_of_its_own(session, clip):
    first, second = (make_video(session, checked_request(SMALL), clip, QueuedJob()) for _ in range(2))
    assert first.video != second.video
    with VideoData(first.video) as one, VideoData(second.video) as other:
        assert [frame.tobytes() for frame in one] == [frame.tobytes() for frame in other]


def test_a_cancelled_run_writes_nothing(session, clip):
    before, job = set(session.output_dir.iterdir()), QueuedJob()
    job.cancel()
    with pytest.raises(JobCancelledError, match="no video was written"):
        make_video(session, checked_request(SMALL), clip, job)
    assert set(session.output_dir.iterdir()) == before


def test_a_run_tells_its_stages_losses_and_previews(session, clip):
    seen = []

    class Listening(QueuedJob):
        def report(self, **changes):
            super().report(**changes)
            seen.append(self.progress)

    make_video(session, checked_request(SMALL), clip, Listening())
    assert {"encode text", "encode video", "guidance", "sampling", "decode", "write"} <= {
        p.stage for p in seen
    }
    assert seen[-1].step == 2
    assert len(seen[-1].losses) == 2
    assert base64.b64encode(seen[-1].preview).decode() in panel.running(seen[-1], "running", 0, 1.0)
    half = next(p for p in seen if p.step == 1)
    text = panel.running(half, "running", 0, 30.0)
    assert 'role="progressbar"' in text
    assert 'aria-valuenow="50"' in text
    assert f"motion loss {half.losses[-1] - 1:+.0%}" in text
    assert "about 30 s left" in text
    assert "left" not in panel.running(seen[-1], "running", 0, 60.0)
    assert 'aria-live="polite"' in panel.message("Waiting for the model.")


def test_the_prompt_and_its_button_come_first_and_defaults_are_told(session):
    pytest.importorskip("gradio")
    from diffsynth.webui.app import build
    from diffsynth.webui.page import Page

    page = Page(session, JobQueue(1))
    demo = build(page)
    parts = [c["props"] for c in demo.config["components"]]
    places = [part.get("elem_id") for part in parts]
    assert places[places.index("go") :][:4] == ["go", "cancel", "expected", "panel"]  # without a scroll
    labels = [part.get("label") or part.get("value") for part in parts]
    assert labels.index("Prompt") < labels.index("Generate") < labels.index("Reference")
    (steps,) = (part for part in parts if part.get("elem_id") == "steps")
    assert steps["placeholder"] == str(session.open()[0].defaults["num_inference_steps"])
    hint = next(one.fn for one in demo.fns.values() if "model" in [field.elem_id for field in one.outputs])
    fast = session.open()[0].defaults.with_preset("fast")
    assert hint("tiny", "fast")[3]["placeholder"] == str(fast["num_inference_steps"])
    (modes,) = (part["choices"] for part in parts if part.get("elem_id") == "mode")
    assert ("No_transfer: the prompt alone", "No_transfer") in modes


def test_a_visitor_sees_the_own_runs_and_the_owner_those_of_all(session, clip, queue):
    pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    run = make_video(session, checked_request(SMALL), clip, QueuedJob())
    page = Page(session, queue, shared=False)

    def enter(**params):
        seen, gallery, names, is_owner, _ = page.enter(SimpleNamespace(query_params=params))
        assert len(gallery) == len(names)
        return seen, names, is_owner

    assert enter() == enter(owner="") == enter(owner="a guess") == ([], [], False)
    seen, names, is_owner = enter(owner=page.owner_key)
    assert (seen, is_owner) == (None, True)
    assert run.video.name in names
    chosen = [run.video.name], SimpleNamespace(index=0)
    assert "is not yours" in page.open_past(chosen[0], [], chosen[1])[0]
    assert run.video.name in page.open_past(chosen[0], chosen[0], chosen[1])[0]

    gate = threading.Event()
    job = queue.submit(lambda _: gate.wait(PATIENCE), "a cat")
    assert page.all_runs(False)["choices"] == []
    assert [(text.split(": ")[1], name) for text, name in page.all_runs(True)["choices"]] == [
        ("a cat", job.id)
    ]
    gate.set()
    shared = Page(session, queue)
    assert shared.enter(SimpleNamespace(query_params={}))[0] is None
    assert not shared.enter(SimpleNamespace(query_params={}))[3]


def test_the_time_of_a_run_follows_from_the_newest_one(session, clip, tmp_path):
    lone = replace(session, output_dir=tmp_path)
    assert expected_minutes(lone, planned(lone, checked_request(SMALL))) is None
    run = make_video(lone, checked_request(SMALL), clip, QueuedJob())
    same, longer = (
        expected_minutes(lone, planned(lone, checked_request({**SMALL, "num_inference_steps": steps})))
        for steps in (2, 4)
    )
    assert 60 * same == pytest.approx(run_seconds(run.record))
    assert 1.5 < longer / same < 2.5
    with pytest.raises(ValueError, match="are the limit here"):
        check_budget(replace(lone, max_minutes=same / 2), checked_request(SMALL), clip)
    enough = replace(lone, max_minutes=same * 1.01)
    check_budget(enough, checked_request(SMALL), clip)
    with pytest.raises(ValueError, match="are the limit here"):
        check_budget(enough, checked_request(SMALL), clip, beside=True)


def test_the_speed_is_measured_without_a_word_about_the_prompt(session, monkeypatch, caplog):
    monkeypatch.setattr(
        session.open()[0], "defaults", replace(session.open()[0].defaults, words=("a", "red"))
    )
    assert _pace(session.open()[0]) > 0
    assert "the model knows" not in caplog.text


def test_the_motion_of_a_reference_is_made_once(session, clip):
    request = checked_request({**SMALL, "prompt": "motion"})
    path = show_motion(session, request, clip, QueuedJob())
    made = path.stat().st_mtime_ns
    assert show_motion(session, request, clip, QueuedJob()) == path
    assert path.stat().st_mtime_ns == made


def test_previews_give_the_colours_of_what_was_encoded(session):
    colours = fit_colours(session.open()[0])
    assert colours.shape == (session.open()[0].vae.z_dim + 1, 3)
    latents = torch.zeros(1, session.open()[0].vae.z_dim, 2, 4, 6)
    frames = latent_frames(latents, torch.cat([colours[:-1] * 0, torch.tensor([[1.0, 0.0, -1.0]])]))
    assert [frame.size for frame in frames] == [(6, 4)] * 2
    assert frames[0].getpixel((0, 0)) == (255, 128, 0)
    event = RunEvent(stage="sampling", step=1, steps=2, clean=torch.full_like(latents, torch.nan))
    assert Previews(session.open()[0]).of(event) is not None


# What is asked for.


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", " ", "prompt is empty"),
        ("prompt", "a" * 4001, "prompt must be text of at most 4000 characters"),
        ("prompt", 3, "prompt must be text of at most 4000 characters; got 3"),
        ("mode", "MOFT", "mode must be one of .*; got 'MOFT'"),
        ("seed", 1.5, "seed must be a whole number from 0 to"),
        ("height", 10**9, "height must be a whole number from 16 to 2160; got 1000000000"),
        ("num_frames", float("nan"), "num_frames must be a whole number from 1 to 481; got nan"),
        (
            "denoising_strength",
            True,
            "denoising_strength must be a finite number at least 0.05.*; got True",
        ),
    ],
)
def test_requests_out_of_range_are_named(field, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        checked_request({"prompt": "a cat", field: value})


# One thing at a time.


def test_jobs_run_one_after_the_other_in_their_order(queue):
    order, running = [], threading.Semaphore(1)

    def work(index):
        assert running.acquire(blocking=False)
        order.append(index)
        running.release()
        return index

    jobs = [queue.submit(lambda _job, i=i: work(i)) for i in range(4)]
    assert [job.result(PATIENCE) for job in jobs] == order == [0, 1, 2, 3]
    assert {job.state for job in jobs} == {DONE}


def test_more_than_may_wait_are_refused(queue):
    go_on = threading.Event()
    jobs = [queue.submit(lambda _job: go_on.wait(PATIENCE)) for _ in range(4)]
    with pytest.raises(QueueFullError, match="3 runs are waiting already; try again"):
        queue.submit(lambda _job: None)
    assert queue.ahead(jobs[3]) == 3
    go_on.set()
    jobs[3].result(PATIENCE)
    assert queue.submit(lambda _job: 5).result(PATIENCE) == 5


def test_waiting_and_running_jobs_can_be_cancelled_and_the_next_one_runs(queue):
    def work(job):
        while True:
            job.check()
            time.sleep(0.01)

    first, second = queue.submit(work), queue.submit(work)
    third = queue.submit(lambda _job: "done")
    assert queue.cancel(second.id)
    assert queue.cancel(first.id)
    assert not queue.cancel("somebody else's")
    with pytest.raises(JobCancelledError):
        first.result(PATIENCE)
    with pytest.raises((CancelledError, JobCancelledError)):
        second.result(PATIENCE)
    assert third.result(PATIENCE) == "done"
    assert [first.state, second.state] == [CANCELLED, CANCELLED]


def test_a_job_that_fails_does_not_stop_the_queue(queue):
    bad = queue.submit(lambda _job: 1 / 0)
    assert queue.submit(lambda _job: 1).result(PATIENCE) == 1
    assert bad.state == FAILED
    assert "division by zero" in panel.failure_text(bad.error())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("prompt is empty"), "prompt is empty"),
        (torch.OutOfMemoryError("CUDA out of memory"), "Memory ran out. Choose a smaller size"),
        (OSError(28, "No space left on device"), "The disk is full"),
        (KeyError("x"), "The run failed: 'x'"),
    ],
)
def test_failures_are_told_in_words(error, said):
    assert said in panel.failure_text(error)


def test_errors_name_files_of_the_server_without_their_folders(session, queue):
    gradio = pytest.importorskip("gradio")
    from diffsynth.webui.app import Page

    def start():
        arrived = session.cache.parent / "uploads" / "0a1b" / "b.mp4"
        raise ValueError(f"{session.references}/a-0a1b.mp4 and {arrived} are damaged")

    told = Page(session, queue)._follow(start, lambda _: (), num_shown=0)
    assert ">a-0a1b.mp4 and b.mp4 are damaged<" in next(told)[0]
    with pytest.raises(gradio.Error) as error:
        next(told)
    assert error.value.message == "a-0a1b.mp4 and b.mp4 are damaged"


@pytest.mark.parametrize(
    ("host", "allowed", "shared"),
    [("127.0.0.1", [], True), ("127.0.0.1", ["a.org"], False), ("0.0.0.0", [], False)],
)
def test_all_runs_are_shown_only_where_no_proxy_serves_others(host, allowed, shared, tmp_path, monkeypatch):
    pytest.importorskip("gradio")
    from diffsynth.webui import command

    seen = {}
    monkeypatch.setattr(command, "open_session", lambda *_given, **_named: None)
    monkeypatch.setattr(command, "other_sessions", lambda *_given: [])
    monkeypatch.setattr(command, "Page", lambda _session, _queue, **named: seen.update(named))
    monkeypatch.setattr(command, "make_app", None)  # the end of this test
    asked = {"auth": "a:b", "auth_file": None, "max_upload": 1, "max_frames": 9, "host": host, "port": 0}
    asked |= {"output_dir": tmp_path, "max_waiting": 1, "model": None, "models_dir": "models"}
    asked |= {"max_minutes": None, "shared": False, "allow_host": allowed}
    with pytest.raises(TypeError):
        command.run(Namespace(**asked), SimpleNamespace(problem=print, note=print))
    assert seen == {"shared": shared}


def test_what_is_told_is_no_html_of_visitors():
    assert "<b>" not in panel.message("<b>bold</b>", "error")
    waiting = panel.running(RunProgress(stage="<script>"), "running", 0, 0.0)
    assert "<script>" not in waiting
    assert "2 runs before yours" in panel.running(RunProgress(), "waiting", 2, 0.0)


def test_two_clicks_are_two_runs_and_the_panel_says_that_one_waits(session, queue):
    pytest.importorskip("gradio")
    from diffsynth.webui.page import Page

    page, gate, visitor = Page(session, queue), threading.Event(), SimpleNamespace(session_hash="a visitor")
    queue.submit(lambda _: gate.wait(PATIENCE), "of another", "another")
    values = values_of("a cat", "No_transfer")
    clicks = [page.generate(visitor, None, *values) for _ in range(2)]
    assert "1 run before yours" in next(clicks[0])[0]
    (both, first), (same, id_too) = next(clicks[1])[:2], next(clicks[0])[:2]
    assert (both, first) == (same, id_too)
    assert "1 run of yours after this one" in both
    gate.set()
    names = [[*outputs][-1][6] for outputs in clicks]
    assert sorted(names) == ["a-cat-seed3-2.mp4", "a-cat-seed3.mp4"]


# Uploads.


@pytest.fixture
def places(tmp_path):
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads", tmp_path / "kept"


def keep(path, places, **limits):
    return keep_upload(path, *places, UploadLimits(**limits))


def test_an_upload_is_kept_once_under_a_safe_name(clip, places):
    names = ["../../etc/passwd.mp4", "a b;c.mp4"]
    kept = set()
    for name in names:
        arrived = places[0] / name.replace("/", "_")
        arrived.write_bytes(clip.read_bytes())
        kept |= {keep(arrived, places), keep(arrived, places)}
        assert arrived.stat().st_mtime == 0  # it goes first when others need room
    assert len(kept) == 2
    assert all(path.parent == places[1] and path.read_bytes() == clip.read_bytes() for path in kept)
    assert safe_stem("../..") == "reference"
    assert sorted(places[1].iterdir()) == sorted(kept)


def outside(_places, clip):
    return clip


def climbing(places, clip):
    (places[0].parent / "secret.mp4").write_bytes(clip.read_bytes())
    return places[0] / ".." / "secret.mp4"


def a_link(places, clip):
    (places[0] / "link.mp4").symlink_to(clip)
    return places[0] / "link.mp4"


def through_a_linked_folder(places, clip):
    (places[0] / "folder").symlink_to(clip.parent)
    return places[0] / "folder" / clip.name


def a_folder(places, _clip):
    (places[0] / "folder.mp4").mkdir()
    return places[0] / "folder.mp4"


def nothing(places, _clip):
    return places[0] / "missing.mp4"


@pytest.mark.parametrize("make", [outside, climbing, a_link, through_a_linked_folder, a_folder, nothing])
def test_only_files_that_were_uploaded_are_taken(clip, places, make):
    with pytest.raises(ValueError, match="not a file that was uploaded here"):
        keep(make(places, clip), places)
    assert not list(places[1].iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"#EXTM3U\nfile:///etc/passwd\n", "no video of a known kind"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "no video of a known kind"),
        (b"\0\0\0\x20ftypisom" + bytes(200), "cannot be decoded"),
        (b"GIF89a" + bytes(100), "cannot be decoded"),
    ],
)
def test_what_is_no_video_is_refused(places, content, message):
    path = places[0] / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        keep(path, places)
    assert not list(places[1].iterdir())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"megabytes": 0.001}, "larger than 0.001 MB"),
        ({"frames": 4}, "more than 4 frames"),
        ({"pixels": 100}, "more than 100 pixels"),
        ({"pixels_of_all": 5 * 32 * 32 - 1}, "has 5 frames of 32x32, and all may have 5.12e"),
    ],
)
def test_uploads_over_a_limit_are_refused(clip, places, limits, message):
    path = places[0] / "clip.mp4"
    path.write_bytes(clip.read_bytes())
    with pytest.raises(ValueError, match=message):
        keep(path, places, **limits)
    assert not list(places[1].iterdir())


def test_past_runs_are_neither_links_nor_foreign_files(session, clip, tmp_path):
    run = make_video(session, checked_request(SMALL), clip, QueuedJob())
    (tmp_path / "other.mp4.json").symlink_to(run.record_file)
    (tmp_path / "other.mp4").symlink_to(run.video)
    (tmp_path / "broken.mp4.json").write_text("{")
    assert past_runs(tmp_path) == []
    for name in ("other.mp4", "../videos/" + run.video.name, "missing.mp4", str(run.video)):
        with pytest.raises(ValueError, match="there is no past run"):
            find_run(tmp_path, name)
    publish(list(VideoData(clip)), tmp_path / "mine.mp4", run.record, overwrite=True)
    assert [run.video.name for run in past_runs(tmp_path)] == ["mine.mp4"]


def test_there_are_clips_to_begin_with():
    clips = [path for folder in CLIP_FOLDERS for path in sorted(folder.glob("*.mp4"))]
    assert {"bounce", "circle", "zigzag"} <= {path.stem for path in clips}
    assert len(VideoData(clips[0])) >= 17


# The server.


def asked(path):
    """(status, headers, whether the app behind was asked) of a request."""
    import asyncio

    sent, reached = [], []

    async def app(scope, _receive, send):
        reached.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "GET", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, uploads=Path("uploads"), cache=Path("cache"))(scope, None, send))
    return sent[0]["status"], dict(sent[0]["headers"]), bool(reached)


def test_the_server_fetches_nothing_for_visitors_and_keeps_browsers_here():
    for path in (
        "/gradio_api/proxy=http://10.0.0.1/",
        "/gradio_api/file=https%3A//example.org/x",
        "/file=HTTP://a",
    ):
        assert asked(path)[::2] == (403, False)
    status, headers, reached = asked("/gradio_api/info")
    assert (status, reached) == (200, True)
    assert b"default-src 'self'" in headers[b"content-security-policy"]


def test_hosts_and_passwords_are_read():
    assert [is_local(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip
    assert read_auth("me:a:b") == ("me", "a:b")
    with pytest.raises(ValueError, match="auth must be USER:PASSWORD"):
        read_auth("me:")


def test_a_password_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "auth").write_text("me:secret\n# of the studio\n")
    assert read_auth(None, tmp_path / "auth") == ("me", "secret")
    monkeypatch.setenv("FASTVMT_AUTH", "you:other")
    assert read_auth(None) == ("you", "other")
    assert read_auth("me:mine") == ("me", "mine")
    with pytest.raises(OSError, match="nowhere"):
        read_auth(None, tmp_path / "nowhere")
